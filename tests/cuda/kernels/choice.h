// What a run of a program chooses in kernels that were changed so that it can (kernel_faults.py).
#pragma once

namespace crossvit::choice {

inline int fault = 0;      // the number of what is broken, from 1 on
inline bool over = false;  // the fusion's pass over the tokens lies over other memory of the block

}  // namespace crossvit::choice
