#include "lora_linear.h"

#include "epilogue.h"

namespace dschat {
namespace {

// Keeps x A^T of this thread's rows as [row][rank], scaled.
struct SideInput final : TileSink {
  float* t;
  int64_t first_row, rank;
  float scale;

  SideInput(float* out, int64_t first, int64_t r, float s) : t(out), first_row(first), rank(r), scale(s) {}

  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const override {
    for (int i = 0; i < rows; ++i)
      for (int64_t c = 0; c < panels * kPanel; ++c, ++sums) {
        const int64_t r = panel * kPanel + c;
        if (r < rank) t[(row + i - first_row) * rank + r] = *sums * scale;
      }
  }
};

// Adds the side path to the base sums, then finishes them as linear does.
template <typename T> struct WithSidePath final : TileSink {
  const Output<T>& output;
  const float* t;
  int64_t first_row;
  const PackedMatrix& b;

  WithSidePath(const Output<T>& out, const float* side, int64_t first, const PackedMatrix& matrix)
      : output(out), t(side), first_row(first), b(matrix) {}

  void write(const float* sums, int64_t row, int rows, int64_t panel, int panels) const override {
    alignas(64) float total[kPanel];
    for (int i = 0; i < rows; ++i)
      for (int p = 0; p < panels; ++p, sums += kPanel) {
        Vec lo = load(sums), hi = load(sums + kLanes);
        const float* weights = static_cast<const float*>(b.data) + (panel + p) * b.k * kPanel;
        for (int64_t r = 0; r < b.k; ++r) {
          const Vec side = set1(t[(row + i - first_row) * b.k + r]);
          lo = fma(side, load(weights + r * kPanel), lo);
          hi = fma(side, load(weights + r * kPanel + kLanes), hi);
        }
        store(total, lo);
        store(total + kLanes, hi);
        output.write(total, row + i, 1, panel + p, 1);
      }
  }
};

template <typename T>
void run(const Team& team, DType dtype, const void* x, int64_t x_stride, int64_t rows, const PackedMatrix& w,
         const PackedMatrix& a, const PackedMatrix& b, float scale, void* y, int64_t y_stride) {
  const Share s = share_of(team, rows, w.panels());
  if (s.r0 >= s.r1 || s.p0 >= s.p1) return;
  float* t = static_cast<float*>(scratch(kScratchPack, size_t((s.r1 - s.r0) * a.n) * sizeof(float)));
  multiply_panels(dtype, DType::f32, x, x_stride, a.k, a.data, s.r0, s.r1, 0, a.panels(),
                  SideInput(t, s.r0, a.n, scale));
  const Output<T> output(w, LinearEpilogue{}, y, y_stride);
  multiply_panels(dtype, dtype, x, x_stride, w.k, w.data, s.r0, s.r1, s.p0, s.p1,
                  WithSidePath<T>(output, t, s.r0, b));
}

}  // namespace

void lora_linear(const Team& team, DType dtype, const void* x, int64_t x_stride, int64_t rows, const PackedMatrix& w,
                 const PackedMatrix& a, const PackedMatrix& b, float scale, void* y, int64_t y_stride) {
  if (dtype == DType::f32) run<float>(team, dtype, x, x_stride, rows, w, a, b, scale, y, y_stride);
  else run<bf16>(team, dtype, x, x_stride, rows, w, a, b, scale, y, y_stride);
}

}  // namespace dschat
