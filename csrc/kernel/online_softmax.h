// The mathematics of the loss, once for every kernel. `T` is float or double in a CUDA thread, a vector of either on
// the CPU. No branches: `select(mask, a, b)` chooses lane by lane. The including file provides
//   XENT_INLINE, select(mask, a, b), log(x), exp_and_expm1(x, &exp, &expm1), rough_quotient(a, b)
// for T, and includes this file inside the namespace of each instruction set (hence no include guard).
//
// A *position* is one element of the loss before its reduction. It has logits x_c, coefficients a_c >= 0 made of its
// target (problem.h) with the sum A, p = softmax(x), m = max x, L = log sum_c exp(x_c - m) and lse = m + L:
//
//   loss    = sum_c a_c (lse - x_c) = sum_c a_c (m - x_c) + A L       every term >= 0: nothing cancels
//   d/dx_c  = A p_c - a_c
//   d/dq_c  = (1 - e) w_c (lse - x_c)                                 for probabilities q
//
// The words for its parts, in all kernels; y is the class of an index target, e label smoothing, w class weights:
//
//   ties    = number of c with x_c = m            spread  = sum_c b_c (m - x_c)
//   rest    = sum of exp(x_c - m) over x_c < m    mass    = sum_c b_c
//   hit     = (1 - e) w_y                         gap     = m - x_y
//
// where b_c is a_c without `hit`: (e / C) w_c of an index target, a_c of any other. (The CPU kernels sum w_c, and
// multiply by e / C afterwards.) So L = log(ties + rest), and, with hit = 0 for targets that are no index,
//
//   loss    = hit (gap + L) + spread + mass L
//
// What can be added to the loss of a position:
//
//   z lse^2                        d/dx_c = 2 z lse p_c
//   lse                            d/dx_c = p_c
//   H = -sum_c p_c log p_c         d/dx_c = -p_c (log p_c + H)
//     = L + sum_c exp(x_c - m) (m - x_c) / (ties + rest)              every term >= 0
//   log p_y                        d/dx_c = [c = y] - p_c
//
// So the gradient of any mixture of them is p_c (P + E log p_c) - D a_c, and less at a label's class.

// sum = a + b, rounded, and what rounding lost of it (Knuth, TAOCP 4.2.2).
template <class T>
XENT_INLINE void two_sum(T a, T b, T& sum, T& lost) {
  sum = a + b;
  const T b_in_sum = sum - a;
  lost = (a - (sum - b_in_sum)) + (b - b_in_sum);
}

// L = log(ties + rest). Apart, the two keep log(1 + 1e-9), which a single sum would round to log(1) = 0.
template <class T>
XENT_INLINE T log_of_sum(T ties, T rest) {
  T sum, lost;
  two_sum(ties, rest, sum, lost);
  return log(sum) + rough_quotient(lost, sum);  // a rounding's rounding
}

// The loss, with `share` as a factor of the sums. A coefficient of zero contributes zero, even at a logit of -inf.
template <class T>
XENT_INLINE T index_loss(T hit, T share, T gap, T spread, T mass, T log_sum) {
  const T zero = T{};
  const T own = select(hit == zero, zero, hit * (gap + log_sum));
  const T smoothed = select(share == zero, zero, share * (spread + mass * log_sum));
  return own + smoothed;
}

// A p - a, for a class whose softmax is not near one, or whose coefficient is zero.
template <class T>
XENT_INLINE T plain_gradient(T total, T softmax, T coefficient) {
  return total * softmax - coefficient;
}

// A p - a without cancellation. Where p and a / A are both near one it is A (p - 1) + (A - a), with p - 1 =
// expm1(x - lse). Above `near_one`, -ln 2, the softmax exceeds a half.
template <class T>
XENT_INLINE T soft_gradient(T total, T log_softmax, T coefficient) {
  T softmax, softmax_minus_one;
  exp_and_expm1(log_softmax, softmax, softmax_minus_one);
  const T near_one = T{} - 0.693147180559945309f;
  return select((log_softmax > near_one) & (coefficient + coefficient > total),
                total * softmax_minus_one + (total - coefficient), plain_gradient(total, softmax, coefficient));
}

// A p - a for the class of an index target, where A = hit + rest_of_total and a = hit + smoothed.
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
// difference of the two lse. This constant is rounded, and the sum of q is not one to the last bit. Together they
// change the sum of terms by s - log(1 + s), where s = sum_c q_c expm1(-r_c) would be zero without rounding.

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

// excess = q (expm1(-r) + r) and change = q expm1(-r) = p - q. Where q is zero, r may be anything.
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

// The divergence from the sums of excess, of change and of q.
template <class E, class T>
XENT_INLINE T divergence_of(T excess, T change, T mass) {
  const T zero{}, one = T{} + E(1);
  const T s = change / mass;
  const T result = excess / mass - s * s * (one * E(1.0 / 2) - s * (one * E(1.0 / 3) - s * E(1.0 / 4)));
  return select(result < zero, zero, result);
}

// ---- logits that are transformed first: x = cap tanh(scale x' / cap) ------------------------------------------------

// tanh(x) to all digits, through expm1(-2 |x|).
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

// dx / dx' / scale, from x.
template <class T>
XENT_INLINE T slope_of_softcap(T x, T cap) {
  const T tanh = x / cap;
  return (T{} + 1.f) - tanh * tanh;
}

// ---- the gradient of a mixture --------------------------------------------------------------------------------------

// E p log p, which is zero where p is zero, even at a logit of -inf.
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
