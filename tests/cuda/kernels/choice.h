// Run-time switches of the kernels that kernel_faults.py has changed.
#pragma once

namespace crossvit::choice {

inline int fault = 0;         // the number of the fault, from 1 on
inline bool aliased = false;  // alias the fusion's token pass to other memory of the block

}  // namespace crossvit::choice
