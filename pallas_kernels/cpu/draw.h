// Draws from rows of logits; see draw.cc.
#pragma once

#include <cstdint>

#include "ffi.h"

// Of each row; temperature 0 takes the first of the highest.
struct Rules {
  const float *temperature, *top_p, *min_p;
  const int32_t* top_k;   // 0: all
  const uint32_t* seeds;  // two of each row

  explicit Rules(ffi::Buffer** args);  // in this order
};

// Each row's highest logit, not a number where one is not, and its token.
void draw(const float* logits, int64_t rows, int64_t vocab, const Rules& rules, float* best,
          int32_t* tokens);
