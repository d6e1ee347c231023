// What needs CUDA: cuda.cpp where torch has it, no_cuda.cpp elsewhere.
#pragma once

#include <functional>
#include <string>

namespace flacompile::cuda {

// Compute capability of the GPU, such as "90".
std::string capability();

// Records work, which then runs whole by one launch: what is returned. `first` runs before, so that
// all kernels are loaded.
std::function<void()> record(const std::function<void()>& first, const std::function<void()>& work);

}  // namespace flacompile::cuda
