// The entry points of one instruction set: which kernels take a call, single operations, packing.

namespace hff {
namespace HFF_ISA {

// ---- single operations --------------------------------------------------------------------------

template <class T>
struct LinearRun {
  const hff_linear& linear;
  const hff_linear_io& io;
  Operand<T>* x;      // (rows, cols)
  float* buffers;     // (threads, rows, kMaxBlockRows)
  Counter* counters;  // (threads)

  static void work(void* self, int thread, int width) {
    const LinearRun& run = *static_cast<LinearRun*>(self);
    const hff_linear& l = run.linear;
    const int64_t per_block = block_rows<T>(l.cols);
    float* y = run.buffers + thread * run.io.rows * kMaxBlockRows;
    Shares blocks(run.counters, blocks_of(l.rows, per_block), thread, width);
    for (int64_t i = blocks.take(); i >= 0; i = blocks.take()) {
      const int64_t begin = i * per_block,
                    end = begin + per_block < l.rows ? begin + per_block : l.rows;
      gemv<T>(l, begin, end, run.x, l.cols, run.io.rows, y, kMaxBlockRows);
      for (int64_t r = 0; r < run.io.rows; ++r)
        run.finish_row(begin, end - begin, y + r * kMaxBlockRows, r);
    }
  }
  void finish_row(int64_t begin, int64_t n, float* values, int64_t row) const {
    add_bias<T>(linear, begin, n, values);
    T* out = static_cast<T*>(io.out.data) + row * linear.rows + begin;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t left = n - i < kLanes ? n - i : kLanes;
      store_n(activate<T>(load_n(values + i, left), io.activation), out + i, left);
    }
  }
};

template <class T>
static hff_status linear_of_few(const hff_linear& linear, const hff_linear_io& io) {
  LinearRun<T> run{linear, io, nullptr, nullptr, nullptr};
  const Size size = Size(io.rows) * Size(linear.cols);
  const bool had = with_scratch([&](Arena* a) {
    run.x = a->take<Operand<T>>(size);
    run.buffers = a->take<float>(Size(io.threads) * Size(io.rows) * Size(kMaxBlockRows));
    run.counters = a->take<Counter>(io.threads);
  });
  if (!had) return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of a linear");
  for (int i = 0; i < io.threads; ++i) new (run.counters + i) Counter;
  const T* x = static_cast<const T*>(io.x.data);
  for (int64_t k = 0; k < size.value(); k += kLanes) {
    const int64_t n = size.value() - k < kLanes ? size.value() - k : kLanes;
    store_n(load_n(x + k, n), run.x + k, n);
  }
  run_on_team(io.threads, LinearRun<T>::work, &run);
  return HFF_OK;
}

template <class T, class P>
struct GemmLinearRun {
  const hff_linear& linear;
  const hff_linear_io& io;
  Operands<P> x;                // (rows, cols); the caller's own where they lie as operands
  typename P::Element* panels;  // (threads, unit_room)
  Counter* counters;            // (threads)
  bool copies;
  Barrier barrier;

  static void work(void* self, int thread, int width) {
    GemmLinearRun& run = *static_cast<GemmLinearRun*>(self);
    const TileScope tiles;
    const hff_linear& l = run.linear;
    if (run.copies) run.copy(thread, width);
    T* out = static_cast<T*>(run.io.out.data);
    team_product<T, P>(Slice<T, P>(l), run.io.activation, run.x, run.io.rows, run.counters, thread,
                       width, run.panels + thread * unit_room<P>(l.cols),
                       Target{out, l.rows, sizeof(T)},
                       [&](int64_t row, int64_t column, int64_t n, F v) {
                         store_n(v, out + row * l.rows + column, n);
                       });
  }
  void copy(int thread, int width) {
    const int64_t cols = linear.cols;
    for (int64_t r = io.rows * thread / width; r < io.rows * (thread + 1) / width; ++r) {
      const T* from = static_cast<const T*>(io.x.data) + r * cols;
      for (int64_t k = 0; k < cols; k += kLanes) {
        const int64_t n = cols - k < kLanes ? cols - k : kLanes;
        store_input<T, P>(load_n(from + k, n), x.row(r), k, n);
      }
      zero_tail<P>(x.row(r), cols);
    }
    barrier.wait();
  }
};

template <class T, class P>
static hff_status linear_of_many(const hff_linear& linear, const hff_linear_io& io) {
  using Stored = typename P::Stored;
  const bool copies = !lie_as_operands<T, P>(io.rows, linear.cols);
  GemmLinearRun<T, P> run{linear, io, {}, nullptr, nullptr, copies, {}};
  const int64_t stride = operand_stride<P>(linear.cols);
  const bool had = with_scratch([&](Arena* a) {
    run.x = {a->take<Stored>(copies ? operand_rows<P>(io.rows) * Size(stride) : Size(0)), stride};
    if (!copies) run.x = {static_cast<Stored*>(const_cast<void*>(io.x.data)), linear.cols};
    run.panels = a->take<typename P::Element>(Size(io.threads) * Size(unit_room<P>(linear.cols)));
    run.counters = a->take<Counter>(io.threads);
  });
  if (!had) return fail(HFF_OUT_OF_MEMORY, "no memory for the scratch of a linear");
  for (int i = 0; i < io.threads; ++i) new (run.counters + i) Counter;
  run_on_team(io.threads, GemmLinearRun<T, P>::work, &run, &run.barrier);
  trim_thread_scratch(kKeptScratch);
  return HFF_OK;
}

template <class T>
static hff_status norm_call(const hff_norm& norm, const hff_norm_io& io) {
  for (int64_t r = 0; r < io.rows; ++r) {
    norm_row(static_cast<const T*>(io.x.data) + r * io.hidden,
             static_cast<const T*>(norm.weight.data), static_cast<const T*>(norm.bias.data),
             norm.kind, norm.eps, io.hidden, static_cast<T*>(io.out.data) + r * io.hidden);
  }
  return HFF_OK;
}

// ---- packing ------------------------------------------------------------------------------------

template <class T, class P>
struct PackRun {
  const hff_linear& linear;
  typename P::Element* panels;
  Counter next;

  static void work(void* self, int, int) {
    PackRun& run = *static_cast<PackRun*>(self);
    const int64_t elements = panel_elements<P>(run.linear.cols), count = panels_of(run.linear.rows);
    for (int64_t p = run.next.take(); p < count; p = run.next.take())
      pack_panel<T, P>(run.linear, p, run.panels + p * elements);
  }
};

template <class T, class P>
static hff_status pack_call(const hff_linear& linear, int32_t threads, void* out) {
  const PackedHeader header = packed_header<P>(linear);
  std::memset(out, 0, kPackedHeader);
  PackRun<T, P> run{
      linear, reinterpret_cast<typename P::Element*>(static_cast<char*>(out) + kPackedHeader), {}};
  run_on_team(threads, PackRun<T, P>::work, &run);
  std::memcpy(out, &header, sizeof(header));
  return HFF_OK;
}

// ---- the kernels for a call ---------------------------------------------------------------------

// Whether row kernels run a pass: few rows, a cache, and a layer they know.
HFF_INLINE bool of_few(const hff_call& call, const hff_block* blocks, int64_t count,
                       const hff_cache* caches) {
  if (caches == nullptr || call.starts.data != nullptr || rows_of(call) > kFewRows) return false;
  for (int64_t l = 0; l < count; ++l) {
    if (blocks[l].residual == HFF_RESIDUAL_POST_NORM || blocks[l].k.weight.data != nullptr)
      return false;
  }
  return true;
}

template <class T>
static hff_status model_call(const hff_call& call, const hff_model& model, const hff_cache* caches,
                             const hff_model_io& io) {
  if (of_few(call, model.blocks, model.block_count, caches))
    return model_of_few<T>(call, model, caches, io);
  return with_product<T>(call.precision, [&](auto product) {
    return model_of_many<T, decltype(product)>(call, model, caches, io);
  });
}

template <class T>
static hff_status block_call(const hff_call& call, const hff_block& block, const hff_cache* cache,
                             const hff_block_io& io) {
  if (of_few(call, &block, 1, cache)) return block_of_few<T>(call, block, *cache, io);
  return with_product<T>(call.precision, [&](auto product) {
    return block_of_many<T, decltype(product)>(call, block, cache, io);
  });
}

template <class T>
static hff_status linear_call(const hff_linear& linear, const hff_linear_io& io) {
  if (io.rows <= kFewRows) return linear_of_few<T>(linear, io);
  return with_product<T>(
      io.precision, [&](auto product) { return linear_of_many<T, decltype(product)>(linear, io); });
}

template <class T>
static int64_t packed_bytes_of(int32_t precision, int64_t rows, int64_t cols) {
  return with_product<T>(precision, [&](auto product) {
    const Size size = packed_size<decltype(product)>(rows, cols);
    return size.ok() ? size.value() : int64_t{0};
  });
}

template <class T>
static bool panels_fit(const hff_linear& linear, int32_t precision) {
  return with_product<T>(precision,
                         [&](auto product) { return has_panels<decltype(product)>(linear); });
}

template <class T>
static hff_status pack_weight(const hff_linear& linear, int32_t precision, int32_t threads,
                              void* out) {
  return with_product<T>(precision, [&](auto product) {
    return pack_call<T, decltype(product)>(linear, threads, out);
  });
}

}  // namespace HFF_ISA
}  // namespace hff
