// Names of types, for a GPU and for the tests' CPU.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using bf16 = u16;
using Barrier = u64;  // an mbarrier in shared memory
