// Every kernel body, compiled with the flags that isa.def gives to avx512.
#define LTK_NAMESPACE avx512
#include "kernels.inl"
