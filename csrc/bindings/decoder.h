// Bindings of packing, linear with its backward, and the step plan. Included by cpu.cpp only.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/gemm_int8.h"
#include "cpu/linear.h"
#include "cpu/linear_backward.h"
#include "cpu/lora_linear.h"
#include "cpu/step.h"

namespace dschat {

// (data, n, k, stride_n, stride_k, [(a, b, rank, scale), ...]) as packing.py hands matrices over.
using Update = std::tuple<uintptr_t, uintptr_t, int64_t, double>;
using Matrix = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, std::vector<Update>>;

struct Matrices {
  std::vector<std::vector<LowRank>> updates;
  std::vector<DenseMatrix> dense;

  explicit Matrices(const std::vector<Matrix>& parts) : updates(parts.size()) {
    for (size_t i = 0; i < parts.size(); ++i) {
      const auto& [data, n, k, stride_n, stride_k, deltas] = parts[i];
      for (const auto& [a, b, rank, scale] : deltas)
        updates[i].push_back(
            {reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), rank, float(scale)});
      dense.push_back({reinterpret_cast<const void*>(data), n, k, stride_n, stride_k, updates[i].data(),
                       int(updates[i].size())});
    }
  }
};

inline PackedMatrix packed_matrix(uintptr_t panels, uintptr_t bias, int64_t n, int64_t k, bool gated,
                                  int weights = 0, uintptr_t scales = 0) {
  return {reinterpret_cast<const void*>(panels), reinterpret_cast<const float*>(bias), n, k, gated, Weights(weights),
          reinterpret_cast<const float*>(scales)};
}

// k as panels hold it, padded where their layout needs it.
inline int64_t padded_depth(DType dtype, Weights weights, int64_t k) {
  if (weights == Weights::int8_dynamic) return panel_depth(static_cast<const q8_quad*>(nullptr), k);
  if (dtype == DType::bf16 && weights == Weights::int8) return panel_depth(static_cast<const q8_bf16*>(nullptr), k);
  if (dtype == DType::bf16) return panel_depth(static_cast<const bf16*>(nullptr), k);
  return panel_depth(static_cast<const float*>(nullptr), k);
}

// How bfloat16 products are computed: widened to float32, by dot products of pairs ("bfdot": ARM's, whose bits are others),
// or on AMX tiles; "model": by the software model of the tests.
#if defined(DSCHAT_AMX_MODEL)
constexpr const char* kBf16Products = "amx model";
#elif defined(DSCHAT_AMX)
constexpr const char* kBf16Products = "amx";
#elif defined(DSCHAT_BF16_DOT_MODEL)
constexpr const char* kBf16Products = "dot model";
#elif defined(DSCHAT_BFDOT)
constexpr const char* kBf16Products = "bfdot";
#elif defined(DSCHAT_BF16_DOT)
constexpr const char* kBf16Products = "dot";
#else
constexpr const char* kBf16Products = "float32";
#endif

// What executors.py hands over of a step: tokens, rows, the addresses of token_ids, positions, slot_of_token,
// cu_seqlens, kv_lens and slots, block_table and its stride, k_cache, v_cache, the bytes of a layer of each and whether
// they are int8, selected and the address of selected_tokens.
using Tables = std::tuple<int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                          int64_t, uintptr_t, uintptr_t, int64_t, int64_t, bool, int64_t, uintptr_t>;

inline StepInputs step_inputs(const Tables& tables) {
  StepInputs in;
  uintptr_t ids, positions, slot_of_token, cu_seqlens, kv_lens, slots, block_table, k_cache, v_cache, selected_tokens;
  std::tie(in.tokens, in.rows, ids, positions, slot_of_token, cu_seqlens, kv_lens, slots, block_table,
           in.block_table_stride, k_cache, v_cache, in.k_layer_bytes, in.v_layer_bytes, in.int8_cache,
           in.selected, selected_tokens) = tables;
  in.token_ids = reinterpret_cast<const int64_t*>(ids);
  in.positions = reinterpret_cast<const int32_t*>(positions);
  in.slot_of_token = reinterpret_cast<const int32_t*>(slot_of_token);
  in.cu_seqlens = reinterpret_cast<const int32_t*>(cu_seqlens);
  in.kv_lens = reinterpret_cast<const int32_t*>(kv_lens);
  in.slots = reinterpret_cast<const int32_t*>(slots);
  in.block_table = reinterpret_cast<const int32_t*>(block_table);
  in.k_cache = reinterpret_cast<char*>(k_cache), in.v_cache = reinterpret_cast<char*>(v_cache);
  in.selected_tokens = reinterpret_cast<const int64_t*>(selected_tokens);
  return in;
}

inline void bind_decoder(pybind11::module_& m) {
  namespace py = pybind11;
  using release = py::call_guard<py::gil_scoped_release>;

  m.attr("bf16_products") = kBf16Products;
  m.attr("depth_pairs") = kDepthPairs;
  m.def("panel_depth",
        [](int dtype, int weights, int64_t k) { return padded_depth(DType(dtype), Weights(weights), k); });
  // Returns the digests of the parts' weights as "digest" makes them, where they come with packing; else none.
  m.def(
      "pack_linear",
      [](int source, int target, const std::vector<Matrix>& parts, bool gated, int weights, uintptr_t panels,
         uintptr_t scales, bool digest) {
        Matrices matrices(parts);
        const DenseMatrix* dense = matrices.dense.data();
        const int count = int(matrices.dense.size());
        std::vector<std::vector<uint64_t>> blocks;
        std::vector<uint64_t*> places;
        if (digest && digests_while_packing(dense, count, gated))
          for (int i = 0; i < count; ++i)
            places.push_back(blocks.emplace_back(size_t((dense[i].n + kDigestRows - 1) / kDigestRows)).data());
        parallel([&](const Team& team) {
          pack_linear(team, DType(source), DType(target), dense, count, gated, Weights(weights),
                      reinterpret_cast<void*>(panels), reinterpret_cast<float*>(scales),
                      places.empty() ? nullptr : places.data());
        });
        std::vector<uint64_t> digests;
        for (const auto& part : blocks) digests.push_back(finish_digest(part.data(), int64_t(part.size())));
        return digests;
      },
      release());

  m.def(
      "fuse_lora",
      [](int source, int target, const Matrix& matrix, uintptr_t out) {
        Matrices matrices({matrix});
        parallel([&](const Team& team) {
          fuse_lora(team, DType(source), DType(target), matrices.dense[0], reinterpret_cast<void*>(out));
        });
      },
      release());

  m.attr("digest_rows") = kDigestRows;
  // (address, bytes, bytes of a block) of each buffer
  m.def(
      "digest",
      [](const std::vector<std::tuple<uintptr_t, int64_t, int64_t>>& of) {
        std::vector<DigestBuffer> buffers;
        int64_t total = 0;
        for (const auto& [data, bytes, block] : of) {
          buffers.push_back({reinterpret_cast<const void*>(data), bytes, block});
          total += buffers.back().blocks();
        }
        std::vector<uint64_t> blocks(size_t(total), 0);
        parallel([&](const Team& team) {
          digest_buffers(team, buffers.data(), int64_t(buffers.size()), blocks.data());
        });
        std::vector<uint64_t> digests;
        const uint64_t* at = blocks.data();
        for (const DigestBuffer& buffer : buffers) {
          digests.push_back(finish_digest(at, buffer.blocks()));
          at += buffer.blocks();
        }
        return digests;
      },
      release());

  // linear_int8 is linear with two arguments more: how the panels hold their weights, and the scales.
  const auto linear_int8 = [](int dtype, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t panels, uintptr_t bias,
                              int64_t n, int64_t k, bool gated, int activation, uintptr_t residual,
                              int64_t residual_stride, bool float_output, uintptr_t y, int64_t y_stride,
                              int weights, uintptr_t scales) {
    const PackedMatrix w = packed_matrix(panels, bias, n, k, gated, weights, scales);
    LinearEpilogue e;
    e.activation = Activation(activation);
    e.residual = reinterpret_cast<const void*>(residual);
    e.residual_stride = residual_stride;
    e.float_output = float_output;
    parallel([&](const Team& team) {
      linear(team, DType(dtype), reinterpret_cast<const void*>(x), x_stride, rows, w, e, reinterpret_cast<void*>(y),
             y_stride);
    });
  };
  m.def("linear_int8", linear_int8, release());
  m.def(
      "linear",
      [linear_int8](int dtype, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t panels, uintptr_t bias, int64_t n,
                    int64_t k, bool gated, int activation, uintptr_t residual, int64_t residual_stride,
                    bool float_output, uintptr_t y, int64_t y_stride) {
        linear_int8(dtype, x, x_stride, rows, panels, bias, n, k, gated, activation, residual, residual_stride,
                    float_output, y, y_stride, 0, 0);
      },
      release());

  m.def(
      "lora_linear",
      [](int dtype, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t panels, uintptr_t bias, int64_t n,
         int64_t k, uintptr_t a_panels, uintptr_t b_panels, int64_t rank, float scale, uintptr_t y, int64_t y_stride) {
        const PackedMatrix w = packed_matrix(panels, bias, n, k, false);
        const PackedMatrix a = packed_matrix(a_panels, 0, rank, k, false);
        const PackedMatrix b = packed_matrix(b_panels, 0, n, rank, false);
        parallel([&](const Team& team) {
          lora_linear(team, DType(dtype), reinterpret_cast<const void*>(x), x_stride, rows, w, a, b, scale,
                      reinterpret_cast<void*>(y), y_stride);
        });
      },
      release());

  m.def(
      "transpose_panels",
      [](int dtype, uintptr_t panels, int64_t n, int64_t k, bool gated, uintptr_t out) {
        parallel([&](const Team& team) {
          transpose_panels(team, DType(dtype), reinterpret_cast<const void*>(panels), n, k, gated,
                           reinterpret_cast<void*>(out));
        });
      },
      release());

  m.def(
      "low_rank_grads",
      [](int dtype, uintptr_t x, int64_t x_stride, uintptr_t dy, int64_t dy_stride, int64_t rows, int64_t n, int64_t k,
         int64_t rank, uintptr_t a, uintptr_t b_t, float scale, uintptr_t inner, uintptr_t da, uintptr_t db_t) {
        LowRankGrads g;
        g.x = reinterpret_cast<const void*>(x), g.x_stride = x_stride;
        g.dy = reinterpret_cast<const void*>(dy), g.dy_stride = dy_stride;
        g.T = rows, g.n = n, g.k = k, g.rank = rank;
        g.a = reinterpret_cast<const float*>(a), g.b_t = reinterpret_cast<const float*>(b_t), g.scale = scale;
        g.inner = reinterpret_cast<float*>(inner);
        g.da = reinterpret_cast<float*>(da), g.db_t = reinterpret_cast<float*>(db_t);
        parallel([&](const Team& team) { low_rank_grads(team, DType(dtype), g); });
      },
      release());

  py::class_<StepPlan>(m, "StepPlan")
      .def(py::init([](int dtype, int64_t heads, int64_t kv_heads, int64_t head_dim) {
        return StepPlan(DType(dtype), heads, kv_heads, head_dim);
      }))
      .def("__len__", &StepPlan::size)
      .def("set_buffer",
           [](StepPlan& p, int index, uintptr_t data, int64_t stride) {
             p.set_buffer(index, reinterpret_cast<void*>(data), stride);
           })
      .def("embed",
           [](StepPlan& p, int out, uintptr_t table, int64_t width) {
             Call c{CallKind::embed};
             c.out = out, c.table = reinterpret_cast<const void*>(table), c.width = width;
             p.add(c);
           })
      .def("add_positions",
           [](StepPlan& p, int out, uintptr_t table, int64_t width, int64_t offset) {
             Call c{CallKind::add_positions};
             c.out = out, c.table = reinterpret_cast<const void*>(table), c.width = width, c.offset = offset;
             p.add(c);
           })
      .def("norm",
           [](StepPlan& p, bool rms, int in, int out, uintptr_t weight, uintptr_t bias, int64_t width, float eps,
              int rounding) {
             Call c{rms ? CallKind::rms_norm : CallKind::layer_norm};
             c.in = in, c.out = out, c.width = width, c.eps = eps, c.rounding = NormRounding(rounding);
             c.weight = reinterpret_cast<const float*>(weight), c.bias = reinterpret_cast<const float*>(bias);
             p.add(c);
           })
      .def("head_norm",
           [](StepPlan& p, bool rms, int buffer, int64_t column, int64_t groups, uintptr_t weight, uintptr_t bias,
              int64_t weight_stride, int64_t width, float eps, int rounding) {
             Call c{rms ? CallKind::rms_norm : CallKind::layer_norm};
             c.out = buffer, c.width = width, c.eps = eps, c.rounding = NormRounding(rounding);
             c.groups = groups, c.column = column, c.weight_stride = weight_stride;
             c.weight = reinterpret_cast<const float*>(weight), c.bias = reinterpret_cast<const float*>(bias);
             p.add(c);
           })
      .def("scale",
           [](StepPlan& p, int in, int out, int64_t width, float scale) {
             Call c{CallKind::scale};
             c.in = in, c.out = out, c.width = width, c.scale = scale;
             p.add(c);
           })
      .def("add",
           [](StepPlan& p, int in, int out, int residual, int64_t width, float scale) {
             Call c{CallKind::add};
             c.in = in, c.out = out, c.residual = residual, c.width = width, c.scale = scale;
             p.add(c);
           })
      .def("softcap",
           [](StepPlan& p, int buffer, int64_t width, float cap) {
             Call c{CallKind::softcap};
             c.out = buffer, c.width = width, c.cap = cap;
             p.add(c);
           })
      .def("linear",
           [](StepPlan& p, int in, int out, int residual, int weights, uintptr_t panels, uintptr_t scales, uintptr_t bias,
              int64_t n, int64_t k, bool gated, int activation, bool float_output) {
             Call c{CallKind::linear};
             c.in = in, c.out = out, c.residual = residual;
             c.matrix = packed_matrix(panels, bias, n, k, gated, weights, scales);
             c.activation = Activation(activation), c.float_output = float_output;
             p.add(c);
           })
      .def("rope_append",
           [](StepPlan& p, int qkv, int64_t layer, uintptr_t cos, uintptr_t sin, int64_t rotary_dim, bool interleaved) {
             Call c{CallKind::rope_append};
             c.in = qkv, c.layer = layer;
             c.cos = reinterpret_cast<const float*>(cos), c.sin = reinterpret_cast<const float*>(sin);
             c.rotary_dim = rotary_dim, c.style = interleaved ? RopeStyle::interleaved : RopeStyle::half;
             p.add(c);
           })
      .def("attention",
           [](StepPlan& p, int qkv, int out, int64_t layer, float scale, int64_t window, float cap, uintptr_t alibi) {
             Call c{CallKind::attention};
             c.in = qkv, c.out = out, c.layer = layer, c.scale = scale, c.window = window;
             c.cap = cap, c.alibi = reinterpret_cast<const float*>(alibi);
             p.add(c);
           })
      .def("select_rows",
           [](StepPlan& p, int in, int out, int64_t width) {
             Call c{CallKind::select_rows};
             c.in = in, c.out = out, c.width = width;
             p.add(c);
           })
      .def(
          "run",
          [](StepPlan& p, const Tables& tables, int64_t limit) { p.run(step_inputs(tables), limit); },
          release())
      // (steps done, seconds of sampling)
      .def(
          "decode",
          [](StepPlan& p, const Tables& tables, int64_t steps, int64_t vocab, float temperature, int64_t top_k,
             double top_p, double min_p, uint64_t seed, uintptr_t streams, uintptr_t positions,
             const std::vector<int64_t>& ends, uintptr_t tokens, uintptr_t log_probs) {
            DecodeLoop loop;
            loop.steps = steps, loop.vocab = vocab;
            loop.options = {temperature, top_k, top_p, min_p, seed};
            loop.streams = reinterpret_cast<const int64_t*>(streams);
            loop.positions = reinterpret_cast<const int64_t*>(positions);
            loop.ends = ends.data(), loop.num_ends = int64_t(ends.size());
            loop.tokens = reinterpret_cast<int64_t*>(tokens);
            loop.log_probs = reinterpret_cast<float*>(log_probs);
            const DecodeDone done = p.decode(step_inputs(tables), loop);
            return std::make_tuple(done.steps, done.sampling);
          },
          release());
}

}  // namespace dschat
