// The mathematics of the loss, once for every kernel. `T` is float or double in a CUDA thread, a vector of either on
// the CPU. No branches: `select(mask, a, b)` chooses lane by lane. The including file provides
//   XENT_INLINE, select(mask, a, b), log(x), exp_and_expm1(x, &exp, &expm1), rough_quotient(a, b)
// for T, and includes this file inside the namespace of each instruction set (hence no include guard).
//
// With m = max x, L = log sum exp(x - m), lse = m + L and coefficients a_c >= 0, A = sum_c a_c:
//
//   loss    = sum_c a_c (lse - x_c) = sum_c a_c (m - x_c) + A L       every term >= 0: nothing cancels
//   d/dx_c  = A softmax_c - a_c
//   d/dq_c  = (1 - e) w_c (lse - x_c)
//
// What can be added to it, per position:
//
//   z lse^2                        d/dx_c = 2 z lse softmax_c
//   lse                            d/dx_c = softmax_c
//   H = -sum_c p_c log p_c         d/dx_c = -p_c (log p_c + H)
//     = L + sum_c exp(x_c - m) (m - x_c) / s         every term >= 0
//   log p_y                        d/dx_c = [c = y] - p_c
//
// So whatever mixture of them is differentiated, d/dx_c = p_c (P + E log p_c) - D a_c, and less at a label's class.

// a + b and what rounding lost of it (Knuth, TAOCP 4.2.2).
template <class T>
XENT_INLINE void two_sum(T a, T b, T& sum, T& lost) {
  sum = a + b;
  const T b_in_sum = sum - a;
  lost = (a - (sum - b_in_sum)) + (b - b_in_sum);
}

// log(ties + rest), where `ties` counts the logits that equal the maximum (each adds exp(0) = 1) and `rest` sums the
// exponentials of the others. Apart, they keep log(1 + 1e-9), which a single sum would round to log(1) = 0.
template <class T>
XENT_INLINE T log_of_sum(T ties, T rest) {
  T sum, lost;
  two_sum(ties, rest, sum, lost);
  return log(sum) + rough_quotient(lost, sum);  // a rounding's rounding
}

// The coefficients of an index target: `hit` for the target's class, and `share` of each class's weight.
// The loss where `gap` = m - x_y, `spread` = sum_c w_c (m - x_c), `mass` = sum_c w_c. A coefficient of zero contributes
// zero even where its logit is -inf.
template <class T>
XENT_INLINE T index_loss(T hit, T share, T gap, T spread, T mass, T log_sum) {
  const T zero = T{};
  const T own = select(hit == zero, zero, hit * (gap + log_sum));
  const T smoothed = select(share == zero, zero, share * (spread + mass * log_sum));
  return own + smoothed;
}

// A softmax - a for any class whose softmax is not near one, or whose coefficient is zero.
template <class T>
XENT_INLINE T plain_gradient(T total, T softmax, T coefficient) {
  return total * softmax - coefficient;
}

// A softmax - a without cancellation where softmax and a / A are both near one: there it is A (softmax - 1) + (A - a),
// and softmax - 1 = expm1(x - lse). `near_one` is -ln 2: above it the softmax exceeds a half.
template <class T>
XENT_INLINE T soft_gradient(T total, T log_softmax, T coefficient) {
  T softmax, softmax_minus_one;
  exp_and_expm1(log_softmax, softmax, softmax_minus_one);
  const T near_one = T{} - 0.693147180559945309f;
  return select((log_softmax > near_one) & (coefficient + coefficient > total),
                total * softmax_minus_one + (total - coefficient), plain_gradient(total, softmax, coefficient));
}

// The same for the class of an index target, where A = hit + rest_of_total and a = hit + smoothed.
template <class T>
XENT_INLINE T target_gradient(T hit, T rest_of_total, T smoothed, T log_softmax) {
  T softmax, softmax_minus_one;
  exp_and_expm1(log_softmax, softmax, softmax_minus_one);
  return hit * softmax_minus_one + (rest_of_total * softmax - smoothed);
}

// ---- the divergence of a teacher ------------------------------------------------------------------------------------
//
// With q the teacher's softmax, p the student's and r_c = log q_c - log p_c, so that q_c exp(-r_c) = p_c,
//
//   KL = sum_c q_c r_c = sum_c q_c (expm1(-r_c) + r_c)      for sum p = sum q = 1
//
// where every term is >= 0, and zero where the softmaxes are equal. r is (z_c - x_c) / T less a constant, the
// difference of the two lse. That this is rounded, and that the sum of q is not one to the last bit, changes the sum of
// terms by as much as s - log(1 + s), with s the sum of q_c expm1(-r_c), which is zero but for rounding.

// (expm1(-r) + r) / r^2 for |r| < 1, to all digits of E, the type of T's elements.
template <class E, class T>
XENT_INLINE T series_of_excess(T r) {
  const T one = T{} + E(1);
  T sum{};
  if constexpr (sizeof(E) == 8) {
    sum = one * E(1.0 / 121645100408832000);
    sum = one * E(1.0 / 6402373705728000) - r * sum;
    sum = one * E(1.0 / 355687428096000) - r * sum;
    sum = one * E(1.0 / 20922789888000) - r * sum;
    sum = one * E(1.0 / 1307674368000) - r * sum;
    sum = one * E(1.0 / 87178291200) - r * sum;
    sum = one * E(1.0 / 6227020800) - r * sum;
    sum = one * E(1.0 / 479001600) - r * sum;
  }
  sum = one * E(1.0 / 39916800) - r * sum;
  sum = one * E(1.0 / 3628800) - r * sum;
  sum = one * E(1.0 / 362880) - r * sum;
  sum = one * E(1.0 / 40320) - r * sum;
  sum = one * E(1.0 / 5040) - r * sum;
  sum = one * E(1.0 / 720) - r * sum;
  sum = one * E(1.0 / 120) - r * sum;
  sum = one * E(1.0 / 24) - r * sum;
  sum = one * E(1.0 / 6) - r * sum;
  return one * E(1.0 / 2) - r * sum;
}

// q (expm1(-r) + r) and q expm1(-r) = p - q. Where q is zero, r may be anything.
template <class E, class T>
XENT_INLINE void divergence_terms(T q, T p, T r, T& excess, T& change) {
  const T zero{}, one = T{} + E(1);
  const auto near = (r < one) & (r > -one);
  const T bend = r * r * series_of_excess<E>(r), far = (p - q) + q * r;
  excess = select(near, q * bend, select(far < zero, zero, far));
  change = select(near, q * (bend - r), p - q);
  excess = select(q == zero, p, excess);
  change = select(q == zero, p, change);
}

// From the sums of both, and that of q.
template <class E, class T>
XENT_INLINE T divergence_of(T excess, T change, T mass) {
  const T zero{}, one = T{} + E(1);
  const T s = change / mass;
  const T result = excess / mass - s * s * (one * E(1.0 / 2) - s * (one * E(1.0 / 3) - s * E(1.0 / 4)));
  return select(result < zero, zero, result);
}

// ---- logits that are transformed first: x = cap tanh(scale x' / cap) ------------------------------------------------

// With all relative accuracy, through expm1(-2 |x|).
template <class T>
XENT_INLINE T tanh_of(T x) {
  const T zero = T{}, twice = x + x;
  T unused, minus_one;
  exp_and_expm1(select(x > zero, zero - twice, twice), unused, minus_one);
  const T result = minus_one / (minus_one + 2.f);
  return select(x > zero, zero - result, result);
}

template <class T>
XENT_INLINE T softcapped(T x, T cap) {
  return cap * tanh_of(x / cap);
}

// dx / dx' from x, but for the scale.
template <class T>
XENT_INLINE T slope_of_softcap(T x, T cap) {
  const T tanh = x / cap;
  return (T{} + 1.f) - tanh * tanh;
}

// ---- the gradient of a mixture --------------------------------------------------------------------------------------

// E p log p, which is zero where p is, even at a logit of -inf.
template <class T>
XENT_INLINE T entropy_gradient(T factor, T softmax, T log_softmax) {
  return select(softmax == T{}, T{}, factor * softmax * log_softmax);
}

// d/dz_c of a teacher's logits z at temperature 1: q_c (t_c - sum_k q_k t_k), where q = softmax(z) and the loss is
// sum_k q_k t_k: t_c = lse - x_c, less -log q_c for the divergence.
template <class T>
XENT_INLINE T teacher_gradient(T q, T term, T loss) {
  return select(q == T{}, T{}, q * (term - loss));
}
