// The sums that one read of a position's logits forms online, wherever they come from and however many threads share
// them: the maximum, the sum of exponentials and, for label smoothing and probabilities, the sums of the loss.
//
// Nothing is lost at confidence: `ties` counts the logits that equal the maximum, `rest` sums the exponentials of the
// others, which may be 1e-9. See log_of_sum in kernel/online_softmax.h.
//
// An element costs a maximum, a multiply-add, an ex2 and an addition. With powers of two, 2^(x l - m l) for
// l = log2(e), log2(e) needs no multiplication after the subtraction of the maximum. `reference` is m l, rounded once:
// that shifts all exponents alike, and log_sum takes it back.
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

// Takes expm1 where exp - 1 would cancel: a branch of few threads.
template <class A>
XENT_DEVICE void exp_and_expm1(A x, A& exp_x, A& expm1_x) {
  exp_x = exp2_fast(x * kLog2E<A>);
  expm1_x = x > A(-1) ? expm1(x) : exp_x - A(1);
}

#include "kernel/online_softmax.h"

#undef XENT_INLINE

// Sums a few terms as a tree: short chains of additions are faster and lose less.
template <int N, class A>
XENT_DEVICE A tree_sum(A (&terms)[N]) {
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) terms[j] += terms[j + half];
  }
  return terms[0];
}

// Returns x[j] of an array in registers, which have no addresses: for loops that would be too long unrolled.
template <int N, class A>
XENT_DEVICE A pick(const A (&x)[N], int j) {
  A picked = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) picked = j == i ? x[i] : picked;
  return picked;
}

// Beyond this, neighbouring numbers are so far apart that every logit but the maximum has an exponential of zero.
template <class A>
XENT_DEVICE bool is_huge(A x) {
  return abs(x) > (sizeof(A) == 4 ? A(0x1p30) : A(0x1p62));
}

// A sum of numbers >= 0. A long one, of hundreds of terms, remembers what rounding lost (Dekker's fast two-sum).
template <class A, bool kLong>
struct Sum {
  A sum, lost;

  XENT_DEVICE void add(A term) {
    const A before = sum;
    sum += term;
    if constexpr (kLong) lost += term - (sum - before);
  }
  XENT_DEVICE void set(A value) { sum = value, lost = A(0); }
  XENT_DEVICE A value() const { return kLong && lost == lost ? sum + lost : sum; }  // an infinite sum has lost nothing
};

template <class A, bool kWithCoefficients, bool kLong = false>
struct OnlineSoftmax {
  A max;
  A reference;           // max * log2(e), rounded; infinity where the maximum is huge
  A ties;                // logits that equal the maximum
  Sum<A, kLong> rest;    // sum of 2^(x log2(e) - reference) over the others
  Sum<A, kLong> spread;  // sum of a (max - x), with the coefficients a >= 0 of the loss: nothing cancels
  Sum<A, kLong> mass;    // sum of a

  static XENT_DEVICE OnlineSoftmax of_nothing(const Problem&) {
    return {A(-INFINITY), A(-INFINITY), A(0), {A(0), A(0)}, {A(0), A(0)}, {A(0), A(0)}};
  }

  // Makes `to` the maximum that the sums refer to, if it is larger.
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

  // Adds N logits and their coefficients: an array, or one for all. Most logits are below the maximum so far.
  template <int N, class Coefficients>
  XENT_DEVICE void add(const A (&x)[N], const Coefficients& a) {
    A largest = x[0];
#pragma unroll
    for (int j = 1; j < N; ++j) largest = maximum(largest, x[j]);  // does not see a NaN; the sum does
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

  // The same where no logit exceeds the maximum: no branch, two predicated additions of which each logit makes one.
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
        // Zero for a = 0, even at x = -inf; and for the maximum itself, even where that is -inf so far.
#pragma unroll
        for (int j = 0; j < N; ++j) terms[j] = a[j] == A(0) || x[j] == max ? A(0) : a[j] * (max - x[j]);
        sum = tree_sum(terms);
      }
      spread.add(sum);
      mass.add(tree_sum(masses));
    }
  }

  // One coefficient for all, which is not zero: label smoothing without class weights.
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

  // Puts what rounding lost back into the sums.
  XENT_DEVICE void settle() {
    rest.set(rest.value());
    spread.set(spread.value());
    mass.set(mass.value());
  }

  // log of the sum of exp(x - max). An infinite maximum makes it NaN, and with it the loss, as natively.
  XENT_DEVICE A log_sum() const {
    const A others = rest.value();
    const A shift = others == A(0) ? A(1) : exp2_fast(-fused(max, kLog2E<A>, -reference));
    return log_of_sum(ties, others * shift) + (max - max);
  }
};

// ---- the sums of a kGeneral target ----------------------------------------------------------------------------------

// The coefficients of N logits in the loss, and their classes.
template <class A, int N>
struct Terms {
  A a[N], log[N];  // a_c; log a_c for a divergence's gradient, else zero
  int64_t first, step;

  XENT_DEVICE int64_t class_of(int j) const { return first + j * step; }
};

template <class A, bool kLong>
struct GeneralSums : OnlineSoftmax<A, true, kLong> {
  using Base = OnlineSoftmax<A, true, kLong>;
  using Class = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using Base::max, Base::reference, Base::ties, Base::rest, Base::spread, Base::mass;
  static constexpr Class kNoClass = sizeof(A) == 4 ? Class(INT32_MAX) : Class(INT64_MAX), kNaN = -kNoClass - 1;

  // With labels besides a teacher: the sum of 2^((x - max) slope) over all but the ties, as `rest`. For statistics
  // (slope = 0): the sum of e^(x - max) (max - x), every term >= 0. No target has both.
  Sum<A, kLong> label_rest_or_entropy;
  A slope;
  Class argmax;  // the first class that is the maximum; a NaN's class counts from kNaN, which precedes all others

  static XENT_DEVICE GeneralSums of_nothing(const Problem& problem) {
    const A slope = problem.labels ? A(problem.temperature) * kLog2E<A> : A(0);
    return {Base::of_nothing(problem), {A(0), A(0)}, slope, kNoClass};
  }

  XENT_DEVICE void raise(A to) {
    if (!(to > max)) return;
    const A from = max, before = reference, all = ties + label_rest_or_entropy.value();
    Base::raise(to);
    if (slope != A(0)) {
      if (all != A(0)) label_rest_or_entropy.set(all * exp2_fast((from - to) * slope));
    } else {
      A moved = label_rest_or_entropy.value();
      if (moved != A(0)) moved *= exp2_fast(before - reference);
      if (rest.value() != A(0)) moved += rest.value() * (to - from);
      label_rest_or_entropy.set(moved);
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
      label_rest_or_entropy.add(tree_sum(others));
    } else if (problem.statistics) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        others[j] = powers[j] == A(0) ? A(0) : powers[j] * (max - x[j]);
        const Class c = Class(terms.class_of(j));
        if (x[j] == max) argmax = min(argmax, c);
        if (x[j] != x[j]) argmax = min(argmax, Class(kNaN + c));
      }
      label_rest_or_entropy.add(tree_sum(others));
    }
    ties += tree_sum(equal);
    rest.add(tree_sum(powers));
  }

  // Adds the terms of the loss. None of these logits exceeds the maximum.
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
    label_rest_or_entropy.add(other.label_rest_or_entropy.value());
    argmax = min(argmax, other.argmax);
  }

  // log of the sum of exp(T (x - max)).
  XENT_DEVICE A label_log_sum() const { return log_of_sum(ties, label_rest_or_entropy.value()) + (max - max); }

  XENT_DEVICE A entropy() const {
    const A shift = rest.value() == A(0) ? A(1) : exp2_fast(-fused(max, kLog2E<A>, -reference));
    return Base::log_sum() + label_rest_or_entropy.value() * shift / (ties + rest.value() * shift);
  }
};

// The sums of kernels that find the maximum first: no branch, a comparison and an addition less for each logit.
template <class A>
struct KnownMaximum {
  A max, slope, reference;     // exponentials are 2^(x slope - reference)
  A ties, rest, spread, mass;  // as in OnlineSoftmax

  static XENT_DEVICE KnownMaximum of(A max) {
    // Where the maximum is huge, any slope will do that keeps it: all other exponentials are zero.
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
  // Adds a coefficient's term of the loss. A coefficient of zero at x = -inf makes a NaN: then the sum is made again,
  // by add_careful_spread.
  XENT_DEVICE void add_spread(A x, A a) { spread = fused(a, max - x, spread); }
  XENT_DEVICE void add_careful_spread(A x, A a) { spread += a == A(0) || x == max ? A(0) : a * (max - x); }

  // The part of the reference that rounding lost.
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

// Adds in the same order for every lane, so all get the same bits.
template <class A>
XENT_DEVICE A lanes_sum(A x, int lanes) {
  for (int o = lanes / 2; o > 0; o /= 2) x += shuffle_xor(x, o);
  return x;
}

// Joins the sums of `lanes` neighbouring threads (a power of two), for each of them. All threads of the warp call it.
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
  softmax.label_rest_or_entropy.set(lanes_sum(softmax.label_rest_or_entropy.value(), lanes));
  for (int o = lanes / 2; o > 0; o /= 2) softmax.argmax = min(softmax.argmax, shuffle_xor(softmax.argmax, o));
}

}  // namespace xent::gpu
