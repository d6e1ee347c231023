#include "cuda.h"
#include "json.h"

namespace flacompile::cuda {

std::string capability() { throw Refused("device: expected a torch for CUDA, got another"); }

std::function<void()> record(const std::function<void()>&, const std::function<void()>&) {
  throw Refused("device: expected a torch for CUDA, got another");
}

}  // namespace flacompile::cuda
