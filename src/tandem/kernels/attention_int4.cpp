// Attention to keys and values in int4 (nibbles.h) for one layer: widened to the compute dtype as a block is gathered. Contract in attention.py.
#include "attention.h"

using namespace tandem;

extern "C" {
void attention_int4_bf16(const AttentionArgs* a) { attend<bf16, nibbles>(*a); }
void attention_int4_fp32(const AttentionArgs* a) { attend<float, nibbles>(*a); }
}
