// Python names of rope_append, attention, attention_decode and token_logprobs, and of their backwards; included by cpu.cpp only.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "cpu/attention.h"
#include "cpu/attention_backward.h"
#include "cpu/attention_decode.h"
#include "cpu/rope_append.h"
#include "cpu/token_logprobs.h"
#include "cpu/token_logprobs_backward.h"
#include "cpu/token_logprobs_gradient.h"

namespace dschat {

template <typename T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

inline TokenLogprobsArgs logprobs_args(uintptr_t hidden, int64_t hidden_stride, uintptr_t weight, uintptr_t bias,
                                       uintptr_t targets, int64_t tokens, int64_t hidden_size, int64_t vocab,
                                       float temperature, float softcap, uintptr_t logprob, uintptr_t lse,
                                       uintptr_t entropy, uintptr_t gap) {
  TokenLogprobsArgs a;
  a.hidden = pointer<void>(hidden);
  a.hidden_stride = hidden_stride;
  a.weight = pointer<void>(weight);
  a.bias = pointer<float>(bias);
  a.targets = pointer<int64_t>(targets);
  a.T = tokens;
  a.H = hidden_size;
  a.V = vocab;
  a.temperature = temperature;
  a.softcap = softcap;
  a.logprob = pointer<float>(logprob);
  a.lse = pointer<float>(lse);
  a.entropy = pointer<float>(entropy);
  a.gap = pointer<float>(gap);
  return a;
}

inline void bind_attention(pybind11::module_& m) {
  namespace py = pybind11;
  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def(
      "rope",
      [](int type, uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride, uintptr_t cos, uintptr_t sin,
         uintptr_t positions, int64_t tokens, int64_t heads, int64_t head_dim, int64_t rotary_dim, int style,
         float sign) {
        parallel([&](const Team& team) {
          rope(team, DType(type), pointer<void>(x), x_stride, pointer<void>(y), y_stride, pointer<float>(cos),
               pointer<float>(sin), pointer<int32_t>(positions), tokens, heads, head_dim, rotary_dim, RopeStyle(style),
               sign);
        });
      },
      release);
  m.def(
      "rope_append",
      [](int type, uintptr_t q, int64_t q_stride, uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride,
         uintptr_t q_out, int64_t q_out_stride, uintptr_t cos, uintptr_t sin, uintptr_t positions,
         uintptr_t seq_of_token, uintptr_t block_table, int64_t block_table_stride, uintptr_t k_cache,
         uintptr_t v_cache, int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim, int64_t rotary_dim,
         int style, bool int8_cache) {
        RopeAppendArgs a;
        a.q = pointer<void>(q);
        a.q_stride = q_stride;
        a.k = pointer<void>(k);
        a.k_stride = k_stride;
        a.v = pointer<void>(v);
        a.v_stride = v_stride;
        a.q_out = pointer<void>(q_out);
        a.q_out_stride = q_out_stride;
        a.cos = pointer<float>(cos);
        a.sin = pointer<float>(sin);
        a.positions = pointer<int32_t>(positions);
        a.seq_of_token = pointer<int32_t>(seq_of_token);
        a.block_table = pointer<int32_t>(block_table);
        a.block_table_stride = block_table_stride;
        a.k_cache = pointer<void>(k_cache);
        a.v_cache = pointer<void>(v_cache);
        a.int8_cache = int8_cache;
        a.T = tokens;
        a.Hq = q_heads;
        a.Hkv = kv_heads;
        a.D = head_dim;
        a.rotary_dim = rotary_dim;
        a.style = RopeStyle(style);
        parallel([&](const Team& team) { rope_append(team, DType(type), a); });
      },
      release);
  // num_splits: 1 is attention(), more (or 0: chosen here) is attention_decode().
  m.def(
      "attention",
      [](int type, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride, uintptr_t k_cache,
         uintptr_t v_cache, uintptr_t block_table, int64_t block_table_stride, uintptr_t slots, uintptr_t cu_seqlens,
         uintptr_t kv_lens, int64_t rows, int64_t q_heads, int64_t kv_heads, int64_t head_dim, float scale,
         int64_t window, float softcap, uintptr_t alibi_slopes, int64_t num_splits, bool int8_cache) {
        AttentionArgs a;
        a.q = pointer<void>(q);
        a.q_stride = q_stride;
        a.out = pointer<void>(out);
        a.out_stride = out_stride;
        a.k_cache = pointer<void>(k_cache);
        a.v_cache = pointer<void>(v_cache);
        a.int8_cache = int8_cache;
        a.block_table = pointer<int32_t>(block_table);
        a.block_table_stride = block_table_stride;
        a.slots = pointer<int32_t>(slots);
        a.cu_seqlens = pointer<int32_t>(cu_seqlens);
        a.kv_lens = pointer<int32_t>(kv_lens);
        a.rows = rows;
        a.Hq = q_heads;
        a.Hkv = kv_heads;
        a.D = head_dim;
        a.scale = scale;
        a.window = window;
        a.softcap = softcap;
        a.alibi_slopes = pointer<float>(alibi_slopes);
        const int64_t splits = num_splits == 1 ? 1 : attention_decode_splits(num_threads(), a, num_splits);
        const std::unique_ptr<float[]> partials(new float[size_t(attention_decode_partials(a, splits))]);
        parallel([&](const Team& team) { attention_decode(team, DType(type), a, splits, partials.get()); });
      },
      release);
  m.def(
      "attention_backward",
      [](int type, uintptr_t dout, int64_t dout_stride, uintptr_t q, int64_t q_stride, uintptr_t k, int64_t k_stride,
         uintptr_t v, int64_t v_stride, uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t cu_seqlens, int64_t rows,
         int64_t q_heads, int64_t kv_heads, int64_t head_dim, float scale, int64_t window, float softcap,
         uintptr_t alibi_slopes) {
        AttentionBackwardArgs a;
        a.dout = pointer<void>(dout);
        a.dout_stride = dout_stride;
        a.q = pointer<void>(q);
        a.q_stride = q_stride;
        a.k = pointer<void>(k);
        a.k_stride = k_stride;
        a.v = pointer<void>(v);
        a.v_stride = v_stride;
        a.dq = pointer<void>(dq);
        a.dk = pointer<void>(dk);
        a.dv = pointer<void>(dv);
        a.cu_seqlens = pointer<int32_t>(cu_seqlens);
        a.rows = rows;
        a.Hq = q_heads;
        a.Hkv = kv_heads;
        a.D = head_dim;
        a.scale = scale;
        a.window = window;
        a.softcap = softcap;
        a.alibi_slopes = pointer<float>(alibi_slopes);
        parallel([&](const Team& team) { attention_backward(team, DType(type), a); });
      },
      release);
  m.def(
      "token_logprobs",
      [](int type, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight, uintptr_t bias, uintptr_t targets,
         int64_t tokens, int64_t hidden_size, int64_t vocab, float temperature, float softcap, uintptr_t logprob,
         uintptr_t lse, uintptr_t entropy, uintptr_t gap) {
        TokenLogprobsArgs a = logprobs_args(hidden, hidden_stride, weight, bias, targets, tokens, hidden_size, vocab,
                                            temperature, softcap, logprob, lse, entropy, gap);
        const std::unique_ptr<float[]> partials(new float[size_t(token_logprobs_partials(tokens, vocab))]);
        a.partials = partials.get();
        parallel([&](const Team& team) { token_logprobs(team, DType(type), a); });
      },
      release);
  m.def("token_logprobs_gradient_panels", [](int type, int64_t hidden_size) {
    return token_logprobs_gradient_panels(DType(type), hidden_size);
  });
  m.def(
      "token_logprobs_gradient",
      [](int type, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight, uintptr_t bias, uintptr_t targets,
         int64_t tokens, int64_t hidden_size, int64_t vocab, float temperature, float softcap, uintptr_t logprob,
         uintptr_t lse, uintptr_t entropy, uintptr_t gap, uintptr_t gradient, uintptr_t panels) {
        TokenLogprobsGradientArgs a;
        static_cast<TokenLogprobsArgs&>(a) =
            logprobs_args(hidden, hidden_stride, weight, bias, targets, tokens, hidden_size, vocab, temperature,
                          softcap, logprob, lse, entropy, gap);
        a.gradient = pointer<float>(gradient);
        a.panels = pointer<void>(panels);
        const std::unique_ptr<float[]> partials(new float[size_t(token_logprobs_gradient_partials(tokens, vocab))]);
        a.partials = partials.get();
        parallel([&](const Team& team) { token_logprobs_gradient(team, DType(type), a); });
      },
      release);
  m.def("token_logprobs_backward_panels", [](int type, int64_t hidden_size, int64_t count) {
    return token_logprobs_backward_panels(DType(type), hidden_size, count);
  });
  m.def(
      "token_logprobs_backward",
      [](int type, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight, uintptr_t bias, uintptr_t targets,
         int64_t tokens, int64_t hidden_size, int64_t first, int64_t count, uintptr_t dlogprob, uintptr_t dentropy,
         uintptr_t lse, uintptr_t entropy, float temperature, float softcap, uintptr_t dlogits, int64_t dlogits_stride,
         uintptr_t dhidden, uintptr_t panels) {
        TokenLogprobsBackwardArgs a;
        a.hidden = pointer<void>(hidden);
        a.hidden_stride = hidden_stride;
        a.weight = pointer<void>(weight);
        a.bias = pointer<float>(bias);
        a.targets = pointer<int64_t>(targets);
        a.T = tokens;
        a.H = hidden_size;
        a.first = first;
        a.count = count;
        a.dlogprob = pointer<float>(dlogprob);
        a.dentropy = pointer<float>(dentropy);
        a.lse = pointer<float>(lse);
        a.entropy = pointer<float>(entropy);
        a.temperature = temperature;
        a.softcap = softcap;
        a.dlogits = pointer<void>(dlogits);
        a.dlogits_stride = dlogits_stride;
        a.dhidden = pointer<float>(dhidden);
        a.panels = pointer<void>(panels);
        parallel([&](const Team& team) { token_logprobs_backward(team, DType(type), a); });
      },
      release);
}

}  // namespace dschat
