#include "step.h"

#include <algorithm>
#include <chrono>

#include "layer_norm.h"

namespace dschat {
namespace {

template <typename T>
void embed(const Team& team, const Call& call, const int64_t* ids, int64_t rows, const Buffer& out) {
  const Range mine = team.range(rows);
  for (int64_t t = mine.begin; t < mine.end; ++t)
    std::memcpy(static_cast<T*>(out.data) + t * out.stride, static_cast<const T*>(call.table) + ids[t] * call.width,
                size_t(call.width) * sizeof(T));
}

// x = round(x + table[position + offset])
template <typename T>
void add_positions(const Team& team, const Call& call, const int32_t* positions, int64_t rows, const Buffer& x) {
  const Range mine = team.range(rows);
  for (int64_t t = mine.begin; t < mine.end; ++t) {
    T* row = static_cast<T*>(x.data) + t * x.stride;
    const T* p = static_cast<const T*>(call.table) + (positions[t] + call.offset) * call.width;
    for (int64_t i = 0; i < call.width; i += kLanes) {
      const int n = int(std::min<int64_t>(kLanes, call.width - i));
      store(row + i, load(row + i, n) + load(p + i, n), n);
    }
  }
}

// y = round(scale * x), or with a residual round(residual + round(scale * x))
template <typename T>
void scale_add(const Team& team, const Call& call, int64_t rows, const Buffer& x, const Buffer& residual,
               const Buffer& y) {
  const Range mine = team.range(rows);
  const Vec factor = set1(call.scale);
  for (int64_t t = mine.begin; t < mine.end; ++t) {
    const T* from = static_cast<const T*>(x.data) + t * x.stride;
    const T* r = residual.data ? static_cast<const T*>(residual.data) + t * residual.stride : nullptr;
    T* to = static_cast<T*>(y.data) + t * y.stride;
    for (int64_t i = 0; i < call.width; i += kLanes) {
      const int n = int(std::min<int64_t>(kLanes, call.width - i));
      Vec v = load(from + i, n) * factor;
      if (r) v = load(r + i, n) + round_to<T>(v);
      store(to + i, v, n);
    }
  }
}

// x = cap tanh(x / cap), the form of token_logprobs
void softcap(const Team& team, const Call& call, int64_t rows, const Buffer& x) {
  const Range mine = team.range(rows);
  const Vec cap = set1(call.cap);
  for (int64_t t = mine.begin; t < mine.end; ++t) {
    float* row = static_cast<float*>(x.data) + t * x.stride;
    for (int64_t i = 0; i < call.width; i += kLanes) {
      const int n = int(std::min<int64_t>(kLanes, call.width - i));
      store(row + i, cap * tanh(load(row + i, n) / cap), n);
    }
  }
}

// A norm of slices of every row, in place: the heads of q or k.
void head_norm(const Team& team, DType dtype, const Call& call, int64_t rows, const Buffer& x) {
  const Range mine = team.range(rows);
  const Team alone{0, 1, nullptr};
  const int64_t element = dtype == DType::f32 ? 4 : 2;
  // Slices that share a weight are the rows of one call.
  const int64_t calls = call.weight_stride ? call.groups : 1, slices = call.groups / calls;
  for (int64_t t = mine.begin; t < mine.end; ++t)
    for (int64_t g = 0; g < calls; ++g) {
      void* at = static_cast<char*>(x.data) + (t * x.stride + call.column + g * call.width) * element;
      const float* weight = call.weight ? call.weight + g * call.weight_stride : nullptr;
      const float* bias = call.bias ? call.bias + g * call.weight_stride : nullptr;
      if (call.kind == CallKind::rms_norm)
        rms_norm(alone, dtype, dtype, at, nullptr, weight, at, nullptr, nullptr, slices, call.width, call.width,
                 call.eps, call.rounding);
      else
        layer_norm(alone, dtype, at, nullptr, weight, bias, at, nullptr, nullptr, nullptr, slices, call.width,
                   call.width, call.eps);
    }
}

template <typename T>
void select_rows(const Team& team, const Call& call, const StepInputs& in, const Buffer& x, const Buffer& out) {
  const Range mine = team.range(in.selected);
  for (int64_t i = mine.begin; i < mine.end; ++i)
    std::memcpy(static_cast<T*>(out.data) + i * out.stride,
                static_cast<const T*>(x.data) + in.selected_tokens[i] * x.stride, size_t(call.width) * sizeof(T));
}

}  // namespace

void StepPlan::set_buffer(int index, void* data, int64_t stride) {
  if (index >= int(buffers_.size())) buffers_.resize(size_t(index) + 1);
  buffers_[size_t(index)] = {data, stride};
}

void StepPlan::execute(const Team& team, const Call& call, const StepInputs& in, int64_t rows) const {
  auto buffer = [&](int i) { return i < 0 ? Buffer{} : buffers_[size_t(i)]; };
  const Buffer x = buffer(call.in), y = buffer(call.out), residual = buffer(call.residual);
  const bool f32 = dtype_ == DType::f32;
  const int64_t element = f32 ? 4 : 2;
  switch (call.kind) {
    case CallKind::embed:
      return f32 ? embed<float>(team, call, in.token_ids, rows, y) : embed<bf16>(team, call, in.token_ids, rows, y);
    case CallKind::add_positions:
      return f32 ? add_positions<float>(team, call, in.positions, rows, y)
                 : add_positions<bf16>(team, call, in.positions, rows, y);
    case CallKind::select_rows:
      return f32 ? select_rows<float>(team, call, in, x, y) : select_rows<bf16>(team, call, in, x, y);
    case CallKind::scale:
    case CallKind::add:
      return f32 ? scale_add<float>(team, call, rows, x, residual, y) : scale_add<bf16>(team, call, rows, x, residual, y);
    case CallKind::softcap:
      return softcap(team, call, rows, y);
    case CallKind::rms_norm:
      if (call.groups) return head_norm(team, dtype_, call, rows, y);
      return rms_norm(team, dtype_, dtype_, x.data, nullptr, call.weight, y.data, nullptr, nullptr, rows, call.width,
                      x.stride, call.eps, call.rounding);
    case CallKind::layer_norm:
      if (call.groups) return head_norm(team, dtype_, call, rows, y);
      return layer_norm(team, dtype_, x.data, nullptr, call.weight, call.bias, y.data, nullptr, nullptr, nullptr, rows, call.width, x.stride, call.eps);
    case CallKind::linear: {
      LinearEpilogue e;
      e.activation = call.activation;
      e.residual = residual.data;
      e.residual_stride = residual.stride;
      e.float_output = call.float_output;
      return linear(team, dtype_, x.data, x.stride, rows, call.matrix, e, y.data, y.stride);
    }
    case CallKind::rope_append: {
      char* qkv = static_cast<char*>(x.data);
      RopeAppendArgs a;
      a.q = a.q_out = qkv;
      a.k = qkv + num_heads_ * head_dim_ * element;
      a.v = qkv + (num_heads_ + num_kv_heads_) * head_dim_ * element;
      a.q_out = qkv;
      a.q_stride = a.k_stride = a.v_stride = a.q_out_stride = x.stride;
      a.cos = call.cos;
      a.sin = call.sin;
      a.positions = in.positions;
      a.seq_of_token = in.slot_of_token;
      a.block_table = in.block_table;
      a.block_table_stride = in.block_table_stride;
      a.k_cache = in.k_cache + call.layer * in.k_layer_bytes;
      a.v_cache = in.v_cache + call.layer * in.v_layer_bytes;
      a.int8_cache = in.int8_cache;
      a.T = rows, a.Hq = num_heads_, a.Hkv = num_kv_heads_, a.D = head_dim_;
      a.rotary_dim = call.rotary_dim;
      a.style = call.style;
      return rope_append(team, dtype_, a);
    }
    case CallKind::attention: {
      AttentionArgs a;
      a.q = x.data, a.q_stride = x.stride;
      a.out = y.data, a.out_stride = y.stride;
      a.k_cache = in.k_cache + call.layer * in.k_layer_bytes;
      a.v_cache = in.v_cache + call.layer * in.v_layer_bytes;
      a.int8_cache = in.int8_cache;
      a.block_table = in.block_table;
      a.block_table_stride = in.block_table_stride;
      a.slots = in.slots;
      a.cu_seqlens = in.cu_seqlens;
      a.kv_lens = in.kv_lens;
      a.rows = in.rows, a.Hq = num_heads_, a.Hkv = num_kv_heads_, a.D = head_dim_;
      a.scale = call.scale;
      a.window = call.window;
      a.softcap = call.cap;
      a.alibi_slopes = call.alibi;
      return attention(team, dtype_, a);
    }
  }
}

void StepPlan::walk(const Team& team, const StepInputs& in, int64_t count) const {
  int64_t rows = in.tokens;
  for (int64_t i = 0; i < count; ++i) {
    const Call& call = calls_[size_t(i)];
    execute(team, call, in, rows);
    if (call.kind == CallKind::select_rows) rows = in.selected;
    team.barrier();
  }
}

void StepPlan::run(const StepInputs& in, int64_t limit) const {
  const int64_t count = limit < 0 ? size() : std::min(limit, size());
  parallel([&](const Team& team) { walk(team, in, count); });
}

DecodeDone StepPlan::decode(const StepInputs& first, const DecodeLoop& loop) const {
  using clock = std::chrono::steady_clock;
  const int64_t rows = first.rows;
  std::vector<int32_t> places(first.positions, first.positions + rows), lengths(first.kv_lens, first.kv_lens + rows);
  std::vector<int64_t> draws(loop.positions, loop.positions + rows);
  StepInputs in = first;
  in.positions = places.data(), in.kv_lens = lengths.data();
  const Buffer logits = buffers_[size_t(calls_.back().out)];
  const auto ends_row = [&](int64_t token) {
    return token < 0 || std::find(loop.ends, loop.ends + loop.num_ends, token) != loop.ends + loop.num_ends;
  };
  DecodeDone done;
  bool going = true;
  parallel([&](const Team& team) {
    while (going) {
      walk(team, in, size());
      int64_t* tokens = loop.tokens + done.steps * rows;
      const auto start = clock::now();
      sample(team, DType::f32, logits.data, rows, loop.vocab, logits.stride, loop.options, loop.streams, draws.data(),
             tokens, loop.log_probs + done.steps * rows);
      team.barrier();  // all tokens are there
      if (team.rank == 0) {
        done.sampling += std::chrono::duration<double>(clock::now() - start).count();
        ++done.steps;
        going = done.steps < loop.steps && std::none_of(tokens, tokens + rows, ends_row);
        in.token_ids = tokens;
        for (int64_t i = 0; i < rows; ++i) ++places[size_t(i)], ++lengths[size_t(i)], ++draws[size_t(i)];
      }
      team.barrier();  // `going`, `done` and `in` are those of the next step
    }
  });
  return done;
}

}  // namespace dschat
