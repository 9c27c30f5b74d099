// What one read of a position's logits has to find out, wherever they come from and however many threads share them:
// the maximum and the sum of exponentials, online; and for label smoothing and probabilities the sums that the loss is
// made of.
//
// Sums are kept so that nothing is lost at confidence: logits that equal the maximum are counted (`ties`), and `rest`
// sums the exponentials of the others, which may be 1e-9. See log_of_sum in online_softmax.h.
//
// An element costs a maximum, a multiply-add, an ex2 and an addition. Powers of two save the multiplication by log2(e)
// after the subtraction of the maximum: 2^(x l - m l), l = log2(e), with m l rounded once to `reference`. That rounding
// shifts all exponents alike, and is taken back where sums meet.
#pragma once

#include "portable.cuh"
#include "kernel/problem.h"

namespace xent::gpu {

template <class A>
constexpr A kLog2E = A(1.44269504088896340736);

#define XENT_INLINE XENT_DEVICE

template <class A>
XENT_DEVICE A select(bool condition, A yes, A no) {
  return condition ? yes : no;
}

// expm1 where exp - 1 would cancel; a branch that few threads take.
template <class A>
XENT_DEVICE void exp_and_expm1(A x, A& exp_x, A& expm1_x) {
  exp_x = exp2_fast(x * kLog2E<A>);
  expm1_x = x > A(-1) ? expm1(x) : exp_x - A(1);
}

#include "kernel/online_softmax.h"

#undef XENT_INLINE

// A sum of a few terms, as a tree: short chains of additions are faster and lose less.
template <int N, class A>
XENT_DEVICE A tree_sum(A (&terms)[N]) {
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) terms[j] += terms[j + half];
  }
  return terms[0];
}

// x[j] of an array in registers, which have no addresses: for loops that would be too long unrolled.
template <int N, class A>
XENT_DEVICE A pick(const A (&x)[N], int j) {
  A picked = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) picked = j == i ? x[i] : picked;
  return picked;
}

// Beyond, neighbouring numbers are so far apart that beside the maximum every other logit's exponential is zero.
template <class A>
XENT_DEVICE bool is_huge(A x) {
  return abs(x) > (sizeof(A) == 4 ? A(0x1p30) : A(0x1p62));
}

// A sum of numbers >= 0. One of many terms in a row remembers what rounding has lost (Dekker's fast two-sum).
template <class A, bool kLong>
struct Sum {
  A sum, lost;

  XENT_DEVICE void add(A term) {
    const A before = sum;
    sum += term;
    if constexpr (kLong) lost += term - (sum - before);
  }
  XENT_DEVICE void set(A value) { sum = value, lost = A(0); }
  XENT_DEVICE A value() const { return kLong && lost == lost ? sum + lost : sum; }  // of infinity nothing is lost
};

// `kLong`: a thread adds up hundreds of terms.
template <class A, bool kWithCoefficients, bool kLong = false>
struct OnlineSoftmax {
  A max;
  A reference;           // max * log2(e), rounded; infinity where the maximum is huge
  A ties;                // how many are the maximum
  Sum<A, kLong> rest;    // of 2^(x log2(e) - reference) over the others
  Sum<A, kLong> spread;  // of a (max - x), with the coefficients a >= 0 of the loss: nothing cancels
  Sum<A, kLong> mass;    // of a

  static XENT_DEVICE OnlineSoftmax of_nothing(const Problem&) {
    return {A(-INFINITY), A(-INFINITY), A(0), {A(0), A(0)}, {A(0), A(0)}, {A(0), A(0)}};
  }

  // Makes `to` the maximum that sums refer to.
  XENT_DEVICE void raise(A to) {
    if (!(to > max)) return;
    const A new_reference = is_huge(to) ? A(INFINITY) : to * kLog2E<A>;
    A others = rest.value();
    if (others != A(0)) others *= exp2_fast(reference - new_reference);
    rest.set(others + ties * exp2_fast(fused(max, kLog2E<A>, -new_reference)));
    if constexpr (kWithCoefficients) {
      if (mass.value() != A(0)) spread.set(spread.value() + mass.value() * (to - max));
    }
    max = to;
    reference = new_reference;
    ties = 0;
  }

  // N logits and their coefficients (an array of them, or one for all), in any order: most are below what has been the
  // largest so far.
  template <int N, class Coefficients>
  XENT_DEVICE void add(const A (&x)[N], const Coefficients& a) {
    A largest = x[0];
#pragma unroll
    for (int j = 1; j < N; ++j) largest = maximum(largest, x[j]);  // a NaN is not seen here; it is in the sum
    if (largest >= max) {
      raise(largest);
      add_up_to_max(x, a);
    } else {
      A terms[N];
#pragma unroll
      for (int j = 0; j < N; ++j) terms[j] = exp2_fast(fused(x[j], kLog2E<A>, -reference));
      rest.add(tree_sum(terms));
      add_coefficients(x, a);
    }
  }

  // The same where none exceeds the maximum: no branch, and of two predicated additions each logit makes one.
  template <int N, class Coefficients>
  XENT_DEVICE void add_up_to_max(const A (&x)[N], const Coefficients& a) {
    A sums[2] = {A(0), A(0)};  // two short chains
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A power = exp2_fast(fused(x[j], kLog2E<A>, -reference));
      if (x[j] == max) {
        ties += A(1);
      } else {
        sums[j % 2] += power;
      }
    }
    rest.add(sums[0] + sums[1]);
    add_coefficients(x, a);
  }

  template <int N>
  XENT_DEVICE void add_coefficients(const A (&x)[N], const A (&a)[N]) {
    if constexpr (kWithCoefficients) {
      A terms[N], masses[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        terms[j] = a[j] * (max - x[j]);
        masses[j] = a[j];
      }
      A sum = tree_sum(terms);
      if (sum != sum) {
        // Nothing for a = 0, even at x = -inf; nor for the maximum itself, even where that is -inf so far.
#pragma unroll
        for (int j = 0; j < N; ++j) terms[j] = a[j] == A(0) || x[j] == max ? A(0) : a[j] * (max - x[j]);
        sum = tree_sum(terms);
      }
      spread.add(sum);
      mass.add(tree_sum(masses));
    }
  }

  // One coefficient for all, not zero: label smoothing without class weights.
  template <int N>
  XENT_DEVICE void add_coefficients(const A (&x)[N], A a) {
    if constexpr (kWithCoefficients) {
      A terms[N];
#pragma unroll
      for (int j = 0; j < N; ++j) terms[j] = max - x[j];
      A sum = tree_sum(terms);
      if (sum != sum) {
#pragma unroll
        for (int j = 0; j < N; ++j) terms[j] = x[j] == max ? A(0) : max - x[j];
        sum = tree_sum(terms);
      }
      spread.add(a * sum);
      mass.add(A(N) * a);
    }
  }

  XENT_DEVICE void merge(OnlineSoftmax other) {
    raise(other.max);
    other.raise(max);
    ties += other.ties;
    rest.add(other.rest.value());
    if constexpr (kWithCoefficients) {
      spread.add(other.spread.value());
      mass.add(other.mass.value());
    }
  }

  // Puts what rounding has lost back into the sums.
  XENT_DEVICE void settle() {
    rest.set(rest.value());
    spread.set(spread.value());
    mass.set(mass.value());
  }

  // log of the sum of exp(x - max). An infinite maximum makes it NaN, and with it everything, as natively.
  XENT_DEVICE A log_sum() const {
    const A others = rest.value();
    const A shift = others == A(0) ? A(1) : exp2_fast(-fused(max, kLog2E<A>, -reference));
    return log_of_sum(ties, others * shift) + (max - max);
  }
};

// ---- and what else can be asked for ---------------------------------------------------------------------------------

// What N logits mean for the loss: coefficients a_c, and which classes they are.
template <class A, int N>
struct Terms {
  A a[N], log[N];  // log a_c, for a divergence's gradient; else zero
  int64_t first, step;

  XENT_DEVICE int64_t class_of(int j) const { return first + j * step; }
};

// Statistics of a kGeneral target.
template <class A, bool kLong>
struct GeneralSums : OnlineSoftmax<A, true, kLong> {
  using Base = OnlineSoftmax<A, true, kLong>;
  using Class = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Base::max, Base::reference, Base::ties, Base::rest, Base::spread, Base::mass;
  static constexpr Class kNoClass = sizeof(A) == 4 ? Class(INT32_MAX) : Class(INT64_MAX), kNaN = -kNoClass - 1;

  // Of a temperature for labels: sums 2^((x - max) slope), as `rest` does. Without one (slope zero), e^(x - max)
  // (max - x), for the entropy: every term >= 0.
  Sum<A, kLong> second;
  A slope;
  Class argmax;  // the first class that is the maximum; that of a NaN counts from kNaN, which comes before all others

  static XENT_DEVICE GeneralSums of_nothing(const Problem& problem) {
    const A slope = problem.labels ? A(problem.temperature) * kLog2E<A> : A(0);
    return {Base::of_nothing(problem), {A(0), A(0)}, slope, kNoClass};
  }

  XENT_DEVICE void raise(A to) {
    if (!(to > max)) return;
    const A from = max, before = reference, all = ties + second.value();
    Base::raise(to);
    if (slope != A(0)) {
      if (all != A(0)) second.set(all * exp2_fast((from - to) * slope));
    } else {
      A moved = second.value();
      if (moved != A(0)) moved *= exp2_fast(before - reference);
      if (rest.value() != A(0)) moved += rest.value() * (to - from);
      second.set(moved);
    }
    if (argmax >= 0) argmax = kNoClass;
  }

  template <int N>
  XENT_DEVICE void add(const Problem& problem, const A (&x)[N], const Terms<A, N>& terms) {
    A largest = x[0];
#pragma unroll
    for (int j = 1; j < N; ++j) largest = maximum(largest, x[j]);
    raise(largest);
    A powers[N], others[N], equal[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const bool tie = x[j] == max;
      equal[j] = tie ? A(1) : A(0);
      powers[j] = tie ? A(0) : exp2_fast(fused(x[j], kLog2E<A>, -reference));
    }
    if (slope != A(0)) {
#pragma unroll
      for (int j = 0; j < N; ++j) others[j] = x[j] == max ? A(0) : exp2_fast((x[j] - max) * slope);
      second.add(tree_sum(others));
    } else if (problem.statistics) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        others[j] = powers[j] == A(0) ? A(0) : powers[j] * (max - x[j]);
        const Class c = Class(terms.class_of(j));
        if (x[j] == max) argmax = min(argmax, c);
        if (x[j] != x[j]) argmax = min(argmax, Class(kNaN + c));
      }
      second.add(tree_sum(others));
    }
    ties += tree_sum(equal);
    rest.add(tree_sum(powers));
  }

  // The same for the loss. Of these logits none exceeds the maximum.
  template <int N>
  XENT_DEVICE void add_terms(const A (&x)[N], const Terms<A, N>& terms) {
    A losses[N], masses[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A gap = x[j] == max ? A(0) : max - x[j];
      losses[j] = terms.a[j] == A(0) ? A(0) : terms.a[j] * gap;
      masses[j] = terms.a[j];
    }
    spread.add(tree_sum(losses));
    mass.add(tree_sum(masses));
  }

  XENT_DEVICE void merge(GeneralSums other) {
    raise(other.max);
    other.raise(max);
    Base::merge(other);
    second.add(other.second.value());
    argmax = min(argmax, other.argmax);
  }

  // log of the sum of exp(T (x - max)).
  XENT_DEVICE A label_log_sum() const { return log_of_sum(ties, second.value()) + (max - max); }

  XENT_DEVICE A entropy() const {
    const A shift = rest.value() == A(0) ? A(1) : exp2_fast(-fused(max, kLog2E<A>, -reference));
    return Base::log_sum() + second.value() * shift / (ties + rest.value() * shift);
  }
};

// The same for kernels that find the maximum first: no branch, a comparison and an addition less for each logit.
template <class A>
struct KnownMaximum {
  A max, slope, reference;     // exponentials are 2^(x slope - reference)
  A ties, rest, spread, mass;  // as in Statistics

  static XENT_DEVICE KnownMaximum of(A max) {
    // Where the maximum is huge any slope will do that keeps it: all others come out as zero.
    const A slope = is_huge(max) ? A(1) : kLog2E<A>;
    return {max, slope, rounded_product(max, slope), A(0), A(0), A(0), A(0)};
  }

  // Returns the exponential.
  XENT_DEVICE A add(A x) {
    const A power = exp2_fast(fused(x, slope, -reference));
    if (x == max) {
      ties += A(1);
    } else {
      rest += power;
    }
    return power;
  }
  // With the coefficient, for the loss. At max - x = inf one of zero makes a NaN: then the sum is made again, by
  // add_careful_spread.
  XENT_DEVICE void add_spread(A x, A a) { spread = fused(a, max - x, spread); }
  XENT_DEVICE void add_careful_spread(A x, A a) { spread += a == A(0) || x == max ? A(0) : a * (max - x); }

  // What rounding lost of the reference.
  XENT_DEVICE A lost() const { return fused(max, slope, -reference); }
  XENT_DEVICE A log_sum() const { return log_of_sum(ties, rest * exp2_fast(-lost())) + (max - max); }
};

// ---- across threads -------------------------------------------------------------------------------------------------

template <class A>
XENT_DEVICE A shuffle_xor(A x, int lane) {
  return __shfl_xor_sync(0xffffffffu, x, lane);
}

template <class A>
XENT_DEVICE A lanes_max(A x, int lanes) {
  for (int o = lanes / 2; o > 0; o /= 2) x = maximum(x, shuffle_xor(x, o));
  return x;
}

// In an order that is the same for every lane, so all get the same bits.
template <class A>
XENT_DEVICE A lanes_sum(A x, int lanes) {
  for (int o = lanes / 2; o > 0; o /= 2) x += shuffle_xor(x, o);
  return x;
}

// The statistics of `lanes` neighbouring threads (a power of two), for each of them. All threads of the warp call it.
template <class A, bool kWithCoefficients, bool kLong>
XENT_DEVICE void join_lanes(OnlineSoftmax<A, kWithCoefficients, kLong>& softmax, int lanes) {
  softmax.raise(lanes_max(softmax.max, lanes));
  softmax.ties = lanes_sum(softmax.ties, lanes);
  softmax.rest.set(lanes_sum(softmax.rest.value(), lanes));
  if constexpr (kWithCoefficients) {
    softmax.spread.set(lanes_sum(softmax.spread.value(), lanes));
    softmax.mass.set(lanes_sum(softmax.mass.value(), lanes));
  }
}

template <class A, bool kLong>
XENT_DEVICE void join_lanes(GeneralSums<A, kLong>& softmax, int lanes) {
  softmax.raise(lanes_max(softmax.max, lanes));
  join_lanes(static_cast<OnlineSoftmax<A, true, kLong>&>(softmax), lanes);
  softmax.second.set(lanes_sum(softmax.second.value(), lanes));
  for (int o = lanes / 2; o > 0; o /= 2) softmax.argmax = min(softmax.argmax, shuffle_xor(softmax.argmax, o));
}

}  // namespace xent::gpu
