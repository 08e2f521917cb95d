// What the warps of a CUDA kernel read, by its program: every piece of every matrix once, by one
// warp, in the order in which it is used. "" or what is wrong.
#pragma once

#if defined(HFF_PORT_HOST)

#include <string>
#include <vector>

#include "cuda/plan.h"
#include "random.h"

namespace hff {
namespace cuda {

constexpr int kSize = 2;  // bytes of fp16

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Matrices of a half of a layer in the order of Worker::enter, then of Worker::leave.
std::vector<const Rows*> entered(const Layer& layer, const Half& half);
std::vector<const Rows*> left(const Layer& layer, const Half& half);

std::string walk_token(hff_test::Random& random, const TokenParams& p, int blocks);
std::string walk_phase(hff_test::Random& random, const PhaseParams& p, int blocks);
std::string walk_cluster(hff_test::Random& random, const ClusterParams& p, int ranks);

}  // namespace cuda
}  // namespace hff

#endif
