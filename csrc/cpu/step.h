// A decoder step as a flat list of kernel calls on preallocated buffers, run in one parallel region.
//
// The executor (dschat_kernels/executors.py) builds the list once a pack; a step only sets the token and row tables.
// The buffers may be moved (they grow with the number of tokens) without touching the list: calls name them by index.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "rms_norm.h"
#include "rope_append.h"
#include "sample.h"

namespace dschat {

struct Buffer {
  void* data = nullptr;
  int64_t stride = 0;  // elements from row to row
};

enum class CallKind : int {
  embed, add_positions, scale, add, rms_norm, layer_norm, linear, rope_append, attention, select_rows, softcap
};

struct Call {
  CallKind kind;
  int in = -1, out = -1, residual = -1;  // buffer indices
  PackedMatrix matrix{};                 // linear
  Activation activation = Activation::none;
  bool float_output = false;
  const void* table = nullptr;  // embed, add_positions: [entries, width] of the model's dtype
  int64_t width = 0;            // row width of embed, add_positions, scale, add, norms, select_rows, softcap
  int64_t offset = 0;           // add_positions: added to the position
  const float* weight = nullptr;  // norms: float32
  const float* bias = nullptr;
  float eps = 0;
  NormRounding rounding = NormRounding::llama;
  int64_t groups = 0;  // norms: > 0 normalises `groups` slices of `width` from `column` on, in place
  int64_t column = 0;
  int64_t weight_stride = 0;      // from the weight (and bias) of a slice to the next; 0: all share one
  int64_t layer = 0;              // rope_append, attention
  const float* cos = nullptr;     // rope_append: float32 [max_positions, rotary_dim / 2]; null: no rotation
  const float* sin = nullptr;
  int64_t rotary_dim = 0;
  RopeStyle style = RopeStyle::half;
  float scale = 1;                // scale, add, attention
  int64_t window = 0;             // attention
  float cap = 0;                  // attention, softcap
  const float* alibi = nullptr;   // attention: [query heads]
};

// What a step reads besides the plan.
struct StepInputs {
  int64_t tokens = 0;                     // T
  int64_t rows = 0;                       // R
  const int64_t* token_ids = nullptr;     // [T]
  const int32_t* positions = nullptr;     // [T]
  const int32_t* slot_of_token = nullptr; // [T]
  const int32_t* cu_seqlens = nullptr;    // [R + 1]
  const int32_t* kv_lens = nullptr;       // [R]
  const int32_t* slots = nullptr;         // [R]
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  char* k_cache = nullptr;                // layer 0; layers follow each other
  char* v_cache = nullptr;
  int64_t k_layer_bytes = 0, v_layer_bytes = 0;
  bool int8_cache = false;                // else of the model's dtype
  int64_t selected = 0;                   // rows that go on to the head
  const int64_t* selected_tokens = nullptr;
};

// Steps of one token a row that feed themselves: what one draws is what the next one reads.
struct DecodeLoop {
  int64_t steps = 0;  // at most
  int64_t vocab = 0;
  SampleOptions options{};
  const int64_t* streams = nullptr;    // [R]; null where temperature is 0
  const int64_t* positions = nullptr;  // [R], number of each row's first draw; it rises by one a step
  const int64_t* ends = nullptr;       // ids that end a row
  int64_t num_ends = 0;
  int64_t* tokens = nullptr;     // out: [steps, R]
  float* log_probs = nullptr;    // out: [steps, R]
};

struct DecodeDone {
  int64_t steps = 0;
  double sampling = 0;  // seconds
};

class StepPlan {
 public:
  StepPlan(DType dtype, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) noexcept
      : dtype_(dtype), num_heads_(num_heads), num_kv_heads_(num_kv_heads), head_dim_(head_dim) {}

  void set_buffer(int index, void* data, int64_t stride);
  void add(const Call& call) { calls_.push_back(call); }
  int64_t size() const { return int64_t(calls_.size()); }

  // Runs the first `limit` calls (all: -1). Calls after the first select_rows work on the selected rows.
  void run(const StepInputs& in, int64_t limit) const;

  // Runs loop.steps steps, or as many as it takes until a row is drawn an end or a mark of sample(). The first step is
  // that of `in`, whose rows have a token each and all go to the head; positions and lengths rise by one a step, in
  // copies. The last call's output are the logits.
  DecodeDone decode(const StepInputs& in, const DecodeLoop& loop) const;

 private:
  void walk(const Team& team, const StepInputs& in, int64_t count) const;
  void execute(const Team& team, const Call& call, const StepInputs& in, int64_t rows) const;

  DType dtype_;
  int64_t num_heads_, num_kv_heads_, head_dim_;
  std::vector<Buffer> buffers_;
  std::vector<Call> calls_;
};

}  // namespace dschat
