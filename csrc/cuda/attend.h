// The attention kernels by themselves on a device, for its table of entries.
#pragma once

#include "backend.h"

namespace hff {
namespace cuda {

hff_status attend(const hff_attend_io& io);
hff_status plan_attend(const hff_attend_io& io, hff_attend_plan* plan);

}  // namespace cuda
}  // namespace hff
