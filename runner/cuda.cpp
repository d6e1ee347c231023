#include "cuda.h"

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <memory>

namespace at::cuda {
cudaDeviceProp* getCurrentDeviceProperties();  // whose header includes all of cuBLAS
}

namespace flacompile::cuda {

std::string capability() {
  const cudaDeviceProp& gpu = *at::cuda::getCurrentDeviceProperties();
  return std::to_string(gpu.major) + std::to_string(gpu.minor);
}

std::function<void()> record(const std::function<void()>& first,
                             const std::function<void()>& work) {
  auto graph = std::make_shared<at::cuda::CUDAGraph>();
  const auto before = c10::cuda::getCurrentCUDAStream();
  c10::cuda::device_synchronize();
  c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool());  // the default cannot record
  first();
  c10::cuda::device_synchronize();
  graph->capture_begin();
  work();
  graph->capture_end();
  c10::cuda::setCurrentCUDAStream(before);
  return [graph] { graph->replay(); };
}

}  // namespace flacompile::cuda
