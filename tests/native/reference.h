// What every kernel computes, as its definition reads. One text, two arithmetics:
//   Exact  fp64 throughout: the truth.
//   Stock  the model's dtype as PyTorch computes: fp32 sums in one order, every tensor rounded to
//   the dtype.
// The error of Stock against Exact is the yardstick for the library's.
#ifndef HFF_TESTS_REFERENCE_H
#define HFF_TESTS_REFERENCE_H

#include <cmath>
#include <vector>

#include "data.h"

namespace hff_test {

// What of an fp32 operand the products of a call see, by its precision and instruction set.
enum class Parts { kWhole, kOne, kTwo };

struct Exact {
  using Number = double;
  double round(double x) const { return x; }    // to the dtype of the model
  double single(double x) const { return x; }   // to fp32
  double product(double x) const { return x; }  // to what a matrix product multiplies
  bool backward = false;
  Random* luck = nullptr;
};

struct Stock {
  using Number = float;
  int32_t dtype = HFF_F32;
  bool backward = false;  // the order of sums, first to last or last to first
  // Stochastic rounding: one more sample of the error that correct arithmetic of this precision can
  // make. Where few elements are compared, one sample can be zero by luck.
  Random* luck = nullptr;
  Parts parts = Parts::kWhole;

  // bf16 products: an operand loses its lower half, or what two halves do not hold.
  float product(float x) const {
    if (parts == Parts::kWhole || !std::isfinite(x)) return x;
    const float high = half(x);
    return parts == Parts::kOne || !std::isfinite(high) ? high : high + half(x - high);
  }

  float round(float x) const {
    if (!luck || !std::isfinite(x)) return quantize(dtype, x);
    // fp32: functions are good to one ulp
    const double reach = dtype == HFF_F32 ? 1.0 : 0.5;
    return quantize(dtype,
                    static_cast<float>(x + reach * luck->symmetric() * ulp(dtype, std::fabs(x))));
  }
  float single(double x) const {
    if (!luck || !std::isfinite(x)) return static_cast<float>(x);
    return static_cast<float>(x + 0.5 * luck->symmetric() * ulp(HFF_F32, std::fabs(x)));
  }

 private:
  float half(float x) const {
    const double nudge = luck ? 0.5 * luck->symmetric() * ulp(HFF_BF16, std::fabs(x)) : 0;
    return quantize(HFF_BF16, static_cast<float>(x + nudge));
  }
};

template <class A>
using Row = std::vector<typename A::Number>;
template <class A>
using Rows = std::vector<Row<A>>;

template <class A>
Rows<A> read_rows(const Array& array, int64_t rows, int64_t cols) {
  Rows<A> all(static_cast<size_t>(rows), Row<A>(static_cast<size_t>(cols)));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      all[r][c] = static_cast<typename A::Number>(array.get(r * cols + c));
    }
  }
  return all;
}

template <class A>
typename A::Number dot(const A& a, const typename A::Number* x, const typename A::Number* y,
                       int64_t n) {
  typename A::Number sum = 0;
  if (a.luck) {
    // every partial sum s is rounded by up to half an ulp, 2^-24 |s|: one draw of the spread they
    // add up to
    double whole = 0, squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      whole += static_cast<double>(x[i]) * y[i];
      squares += whole * whole;
    }
    sum = a.single(whole + 0x1p-24 * std::sqrt(squares) * a.luck->symmetric());
  } else if (a.backward) {
    for (int64_t i = n - 1; i >= 0; --i) sum += x[i] * y[i];
  } else {
    for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  }
  return sum;
}

// LayerNorm: (x - mean) / sqrt(var + eps) * w + b, rounded once. RMSNorm: w * round(x /
// sqrt(mean(x^2) + eps)).
template <class A>
Rows<A> norm(const A& a, const NormData& n, const Rows<A>& x) {
  using Number = typename A::Number;
  Rows<A> y = x;
  for (Row<A>& row : y) {
    const int64_t size = static_cast<int64_t>(row.size());
    const Row<A> ones(row.size(), 1);
    const bool layer = n.kind == HFF_NORM_LAYER;
    const Number mean =
        layer ? a.single(dot(a, row.data(), ones.data(), size) / static_cast<double>(size)) : 0;
    for (Number& value : row) value = a.single(static_cast<double>(value) - mean);
    const Number variance =
        a.single(dot(a, row.data(), row.data(), size) / static_cast<double>(size));
    const Number scale = a.single(1 / std::sqrt(static_cast<double>(variance) + n.eps));
    for (int64_t c = 0; c < size; ++c) {
      const Number weight = static_cast<Number>(n.weight.get(c));
      const Number bias = n.bias ? static_cast<Number>(n.bias.get(c)) : 0;
      row[c] = layer ? a.round(row[c] * scale * weight + bias)
                     : a.round(weight * a.round(row[c] * scale));
    }
  }
  return y;
}

// A weight row with every input: each sum in order, four of them side by side.
template <class A>
void dots(const A& a, const Row<A>& weight, const Rows<A>& x, Row<A>& out) {
  const int64_t n = static_cast<int64_t>(weight.size());
  size_t i = 0;
  for (; !a.luck && i + 4 <= x.size(); i += 4) {
    typename A::Number sums[4] = {};
    for (int64_t step = 0; step < n; ++step) {
      const int64_t k = a.backward ? n - 1 - step : step;
      for (size_t u = 0; u < 4; ++u) sums[u] += weight[k] * x[i + u][k];
    }
    std::copy_n(sums, 4, out.begin() + i);
  }
  for (; i < x.size(); ++i) out[i] = dot(a, weight.data(), x[i].data(), n);
}

template <class A>
Rows<A> linear(const A& a, const LinearData& l, Rows<A> x) {
  using Number = typename A::Number;
  Rows<A> y(x.size(), Row<A>(static_cast<size_t>(l.rows)));
  Row<A> weight(static_cast<size_t>(l.cols)), sums(x.size());
  for (Row<A>& row : x) {
    for (Number& value : row) value = a.product(value);
  }
  for (int64_t r = 0; r < l.rows; ++r) {
    for (int64_t c = 0; c < l.cols; ++c)
      weight[c] = a.product(static_cast<Number>(l.weight.get(r * l.row_stride + c)));
    const Number bias = l.bias ? static_cast<Number>(l.bias.get(r)) : 0;
    dots(a, weight, x, sums);
    for (size_t i = 0; i < x.size(); ++i) y[i][r] = a.round(sums[i] + bias);
  }
  return y;
}

template <class A>
Rows<A> activate(const A& a, int32_t activation, Rows<A> x) {
  using Number = typename A::Number;
  const auto apply = [activation](Number v) -> Number {
    const Number half = static_cast<Number>(0.5), one = 1;
    switch (activation) {
      case HFF_ACT_GELU_ERF:
        return half * v * (one + std::erf(v * static_cast<Number>(0.7071067811865475244)));
      case HFF_ACT_GELU_TANH: {
        const Number inner = v + static_cast<Number>(0.044715) * v * v * v;
        return half * v * (one + std::tanh(static_cast<Number>(0.7978845608028653559) * inner));
      }
      case HFF_ACT_RELU:
        return std::isnan(v) ? v : v > 0 ? v : 0;
      case HFF_ACT_SILU:
        return v / (one + std::exp(-v));
      default:
        return v;
    }
  };
  if (activation == HFF_ACT_NONE) return x;
  for (Row<A>& row : x) {
    for (Number& value : row) value = a.round(apply(value));
  }
  return x;
}

// x * cos + rotate_half(x) * sin over the leading rotary_dim elements of a head
template <class A>
void rotate(const A& a, const HeadsData& h, const CallData& call, int64_t b, int64_t i,
            typename A::Number* x) {
  using Number = typename A::Number;
  const int64_t half = h.rotary_dim / 2;
  const Row<A> before(x, x + h.rotary_dim);
  const int64_t table = h.rotary_dim ? call.position(b, i) * h.rotary_dim : 0;
  for (int64_t d = 0; d < h.rotary_dim; ++d) {
    const Number cos = static_cast<Number>(call.cos.get(table + d));
    const Number sin = static_cast<Number>(call.sin.get(table + d));
    const Number partner = d < half ? -before[d + half] : before[d - half];
    x[d] = a.round(a.round(before[d] * cos) + a.round(partner * sin));
  }
}

template <class A>
struct Attended {
  Rows<A> context;      // (rows, heads * head_dim)
  Row<A> keys, values;  // appended: (batch, kv_heads, queries, head_dim)
  // (rows): no key is visible, or every score is -inf: stock's attentions differ, any finite
  // average of values is right
  std::vector<char> all_masked;
};

// q with every key: each sum in order, four of them side by side.
template <class A>
Row<A> score(const A& a, const Row<A>& q, const Row<A>& keys, int64_t total) {
  const int64_t dim = static_cast<int64_t>(q.size());
  Row<A> scores(static_cast<size_t>(total));
  int64_t j = 0;
  for (; !a.luck && j + 4 <= total; j += 4) {
    typename A::Number sums[4] = {};
    for (int64_t step = 0; step < dim; ++step) {
      const int64_t d = a.backward ? dim - 1 - step : step;
      for (int64_t u = 0; u < 4; ++u) sums[u] += q[d] * keys[(j + u) * dim + d];
    }
    std::copy_n(sums, 4, scores.begin() + j);
  }
  for (; j < total; ++j) scores[j] = dot(a, q.data(), keys.data() + j * dim, dim);
  return scores;
}

template <class A>
Row<A> softmax_average(const A& a, const HeadsData& h, const Row<A>& q, const Row<A>& keys,
                       const Row<A>& values, const std::vector<double>& bias, bool* dead) {
  using Number = typename A::Number;
  const int64_t total = static_cast<int64_t>(bias.size());
  Row<A> p(bias.size(), 0);
  Number highest = -std::numeric_limits<Number>::infinity();
  const Row<A> scores = score(a, q, keys, total);
  for (int64_t j = 0; j < total; ++j) {
    if (std::isinf(bias[j])) continue;
    p[j] = a.round(a.round(a.round(scores[j]) * static_cast<Number>(h.scale)) +
                   static_cast<Number>(bias[j]));
    highest = p[j] > highest || std::isnan(p[j]) ? p[j] : highest;
  }
  *dead = highest == -std::numeric_limits<Number>::infinity();
  Number sum = 0;
  for (int64_t j = 0; j < total; ++j) {
    if (!std::isinf(bias[j])) sum += p[j] = std::exp(p[j] - highest);
  }
  Row<A> column(bias.size()), context(static_cast<size_t>(h.head_dim), 0);
  for (Number& weight : p) weight = a.round(weight / sum);
  for (int64_t step = 0; !a.luck && step < total; ++step) {
    const int64_t j = a.backward ? total - 1 - step : step;
    if (std::isinf(bias[j])) continue;
    for (int64_t d = 0; d < h.head_dim; ++d) context[d] += p[j] * values[j * h.head_dim + d];
  }
  for (int64_t d = 0; d < h.head_dim; ++d) {
    for (int64_t j = 0; a.luck && j < total; ++j)
      column[j] = std::isinf(bias[j]) ? 0 : values[j * h.head_dim + d];
    context[d] = a.round(a.luck ? dot(a, p.data(), column.data(), total) : context[d]);
  }
  return context;
}

// qkv: (rows, qkv_width). RoPE on q and k, append k and v, softmax(q k^T scale + mask) v per head.
template <class A>
Attended<A> attend(const A& a, const HeadsData& h, const CallData& call, const CacheData& cache,
                   const Rows<A>& qkv) {
  using Number = typename A::Number;
  const int64_t dim = h.head_dim;
  Attended<A> out;
  out.context.assign(static_cast<size_t>(call.rows()), Row<A>(static_cast<size_t>(h.width())));
  out.all_masked.assign(static_cast<size_t>(call.rows()), 0);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t first = call.first_row(b), queries = call.queries_of(b);
    const int64_t total = call.past + queries;
    for (int64_t group = 0; group < h.kv_heads; ++group) {
      Row<A> keys(static_cast<size_t>(total * dim)), values(keys.size());
      for (int64_t t = 0; t < call.past; ++t) {
        for (int64_t d = 0; d < dim; ++d) {
          keys[t * dim + d] = static_cast<Number>(cache.keys.get(cache.at(b, group, t) + d));
          values[t * dim + d] = static_cast<Number>(cache.values.get(cache.at(b, group, t) + d));
        }
      }
      for (int64_t i = 0; i < queries; ++i) {
        const Row<A>& row = qkv[first + i];
        const int64_t t = call.past + i;
        std::copy_n(row.begin() + h.column(1, group), dim, keys.begin() + t * dim);
        std::copy_n(row.begin() + h.column(2, group), dim, values.begin() + t * dim);
        rotate(a, h, call, b, i, keys.data() + t * dim);
      }
      out.keys.insert(out.keys.end(), keys.begin() + call.past * dim, keys.end());
      out.values.insert(out.values.end(), values.begin() + call.past * dim, values.end());
      for (int64_t i = 0; i < queries; ++i) {
        std::vector<double> bias(static_cast<size_t>(total));
        bool any = false;
        for (int64_t j = 0; j < total; ++j) {
          bias[j] =
              call.sees(i, j) ? call.mask.bias(b, i, j) : -std::numeric_limits<double>::infinity();
          any = any || !std::isinf(bias[j]);
        }
        if (!any) out.all_masked[first + i] = 1;
        if (!any) continue;
        const int64_t share = h.heads / h.kv_heads;
        for (int64_t head = group * share; head < (group + 1) * share; ++head) {
          const Row<A>& row = qkv[first + i];
          Row<A> q(row.begin() + h.column(0, head), row.begin() + h.column(0, head) + dim);
          rotate(a, h, call, b, i, q.data());
          bool dead = false;
          const Row<A> context = softmax_average(a, h, q, keys, values, bias, &dead);
          if (dead) out.all_masked[first + i] = 1;
          std::copy(context.begin(), context.end(), out.context[first + i].begin() + head * dim);
        }
      }
    }
  }
  return out;
}

template <class A>
Rows<A> add(const A& a, const Rows<A>& x, const Rows<A>& y) {
  Rows<A> sum = x;
  for (size_t r = 0; r < x.size(); ++r) {
    for (size_t c = 0; c < x[r].size(); ++c) sum[r][c] = a.round(x[r][c] + y[r][c]);
  }
  return sum;
}

template <class A>
struct BlockResult {
  Attended<A> attended;
  Rows<A> projected;            // attn(norm1(x)), with post-norm attn(x)
  Rows<A> attention, act, out;  // attention: what the MLP's branch starts from, or `projected`
};

// (rows, qkv width) whether q, k and v are one matrix or three.
template <class A>
Rows<A> project(const A& a, const BlockData& b, const Rows<A>& x) {
  Rows<A> rows = linear(a, b.qkv, x);
  if (!b.separate()) return rows;
  for (const LinearData* l : {&b.k, &b.v}) {
    const Rows<A> more = linear(a, *l, x);
    for (size_t r = 0; r < x.size(); ++r)
      rows[r].insert(rows[r].end(), more[r].begin(), more[r].end());
  }
  return rows;
}

template <class A>
BlockResult<A> block(const A& a, const BlockData& b, const CallData& call, const CacheData& cache,
                     const Rows<A>& x) {
  BlockResult<A> r;
  const bool parallel = b.residual == HFF_RESIDUAL_PARALLEL;
  const bool post = b.residual == HFF_RESIDUAL_POST_NORM;
  r.attended =
      attend(a, b.heads, call, cache, project(a, b, post ? x : norm(a, b.attention_norm, x)));
  r.projected = linear(a, b.o, r.attended.context);
  r.attention = parallel ? r.projected : add(a, r.projected, x);
  if (post) r.attention = norm(a, b.attention_norm, r.attention);
  const Rows<A> in = post ? r.attention : norm(a, b.mlp_norm, parallel ? x : r.attention);
  r.act = activate(a, b.activation, linear(a, b.up, in));
  const Rows<A> mlp = linear(a, b.down, r.act);
  r.out = parallel ? add(a, add(a, mlp, r.projected), x) : add(a, mlp, r.attention);
  if (post) r.out = norm(a, b.mlp_norm, r.out);
  return r;
}

}  // namespace hff_test
#endif
