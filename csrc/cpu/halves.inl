// Sums of bfloat16 numbers in float32. The upper halves are stored in the bfloat16 result and the lower halves apart,
// so the sums take no more memory than the result and the lower halves, which are freed afterwards.
//
// add_products            adds one array to another; `first` ignores what was there, `last` rounds to bfloat16
// add_scaled_to_halves    adds factor * x

template <bool first, bool last>
static void add_products(uint16_t* upper, uint16_t* lower, const uint16_t* products, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = std::bit_cast<float>(uint32_t{products[i]} << 16);
    if constexpr (!first) sum += std::bit_cast<float>(uint32_t{upper[i]} << 16 | lower[i]);
    uint32_t bits = std::bit_cast<uint32_t>(sum);
    if constexpr (last) {  // rounded to nearest, ties to even; a NaN stays one
      const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
      bits = sum == sum ? rounded : bits | 0x400000;
    } else {
      lower[i] = uint16_t(bits);
    }
    upper[i] = uint16_t(bits >> 16);
  }
}

static void add_to_halves(uint16_t* upper, uint16_t* lower, const uint16_t* products, int64_t count, bool first,
                          bool last) {
  if (first)
    return last ? add_products<true, true>(upper, lower, products, count)
                : add_products<true, false>(upper, lower, products, count);
  return last ? add_products<false, true>(upper, lower, products, count)
              : add_products<false, false>(upper, lower, products, count);
}

static void add_scaled_to_halves(uint16_t* upper, uint16_t* lower, const uint16_t* x, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float product = factor * std::bit_cast<float>(uint32_t{x[i]} << 16);
    const uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(uint32_t{upper[i]} << 16 | lower[i]) + product);
    upper[i] = uint16_t(bits >> 16);
    lower[i] = uint16_t(bits);
  }
}
