// In place of kernels.cc, for an instruction set that this build lacks; HFF_ABSENT says why.
#include "backend.h"

namespace hff {
namespace HFF_ISA {

extern const Backend kBackend;
const Backend kBackend = {};

const char* absent();
const char* absent() { return HFF_ABSENT; }

bool tiles_checked();
bool tiles_checked() { return false; }

}  // namespace HFF_ISA
}  // namespace hff
