// Every kernel body, compiled with the flags that isa.def gives to baseline.
#define LTK_NAMESPACE baseline
#include "kernels.inl"
