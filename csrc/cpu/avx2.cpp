// Every kernel body, compiled with the flags that isa.def gives to avx2.
#define LTK_NAMESPACE avx2
#include "kernels.inl"
