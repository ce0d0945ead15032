// The launchers of csrc/cuda: plain pointers, sizes and a stream, no header of CUDA or PyTorch. Pointers are of the
// tensors' device (0 stands for what is absent), strides count elements, `type` and `activation` are the numbers of
// dschat_kernels/ops/_common.py. A launcher returns the CUDA error of its launches, 0 for none; it never waits.
// Arguments are in the order of the CPU module's function of the same name, the stream last.
#pragma once

#include <cstdint>

extern "C" {

const char* cuda_error_text(int code);

int launch_layer_norm(int type, const void* x, const void* residual, const float* weight, const float* bias, void* y,
                      void* residual_out, float* mean, float* rstd, int64_t rows, int64_t hidden, int64_t x_stride,
                      float eps, void* stream);
int launch_layer_norm_backward(int type, const void* dy, const void* d_residual_out, const void* h, const float* weight,
                               const float* mean, const float* rstd, void* dx, float* dweight, float* dbias,
                               float* partial, int64_t rows, int64_t hidden, void* stream);
int launch_rms_norm(int x_type, int y_type, const void* x, const void* residual, const float* scale, void* y,
                    void* residual_out, float* rstd, int64_t rows, int64_t hidden, int64_t x_stride, float eps,
                    int rounding, void* stream);
int launch_rms_norm_backward(int x_type, int y_type, const void* dy, const void* d_residual_out, const void* h,
                             const float* scale, const float* rstd, void* dx, float* dscale, float* partial,
                             int64_t rows, int64_t hidden, int rounding, void* stream);
int launch_bias_act(int type, int activation, const void* x, const float* bias, void* y, int64_t rows, int64_t columns,
                    int64_t x_stride, void* stream);
int launch_bias_act_backward(int type, int activation, const void* dy, const void* x, const float* bias, void* dx,
                             float* dbias, float* partial, int64_t rows, int64_t columns, int64_t x_stride,
                             void* stream);
int launch_gated_act(int type, int activation, const void* gate, const void* up, const float* gate_bias,
                     const float* up_bias, void* y, int64_t rows, int64_t columns, int64_t gate_stride,
                     int64_t up_stride, void* stream);
int launch_gated_act_backward(int type, int activation, const void* dy, const void* gate, const void* up,
                              const float* gate_bias, const float* up_bias, void* dgate, void* dup, float* dgate_bias,
                              float* dup_bias, float* partial, int64_t rows, int64_t columns, int64_t gate_stride,
                              int64_t up_stride, int64_t grad_stride, void* stream);
int launch_rope(int type, const void* x, int64_t x_stride, void* y, int64_t y_stride, const float* cos, const float* sin,
                const int32_t* positions, int64_t tokens, int64_t heads, int64_t head_dim, int64_t rotary_dim, int style,
                float sign, void* stream);
int launch_rope_append(int type, const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v,
                       int64_t v_stride, void* q_out, int64_t q_out_stride, const float* cos, const float* sin,
                       const int32_t* positions, const int32_t* slots, const int32_t* block_table,
                       int64_t table_stride, void* k_cache, void* v_cache, int64_t tokens, int64_t q_heads,
                       int64_t kv_heads, int64_t head_dim, int64_t rotary_dim, int style, void* stream);
int launch_attention(int type, const void* q, int64_t q_stride, void* out, int64_t out_stride, const void* k_cache,
                     const void* v_cache, const int32_t* block_table, int64_t table_stride, const int32_t* slots,
                     const int32_t* cu_seqlens, const int32_t* kv_lens, int64_t rows, int64_t tokens, int64_t q_heads,
                     int64_t kv_heads, int64_t head_dim, float scale, int64_t window, float softcap,
                     const float* slopes, void* stream);
int launch_attention_decode(int type, const void* q, int64_t q_stride, void* out, int64_t out_stride,
                            const void* k_cache, const void* v_cache, const int32_t* block_table, int64_t table_stride,
                            const int32_t* slots, const int32_t* cu_seqlens, const int32_t* kv_lens, int64_t rows,
                            int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim, float scale,
                            int64_t window, float softcap, const float* slopes, int64_t num_splits, float* scratch,
                            void* stream);
int launch_attention_backward(int type, const void* dout, int64_t dout_stride, const void* q, int64_t q_stride,
                              const void* k, int64_t k_stride, const void* v, int64_t v_stride, void* dq, void* dk,
                              void* dv, const int32_t* cu_seqlens, int64_t rows, int64_t q_heads, int64_t kv_heads,
                              int64_t head_dim, float scale, int64_t window, float softcap, const float* slopes,
                              int64_t tokens, float* stats, void* stream);
int launch_linear(int type, const void* x, int64_t x_stride, int64_t rows, const void* weight, const float* bias,
                  int64_t n, int64_t k, bool gated, int activation, const void* residual, int64_t residual_stride,
                  bool float_output, void* y, int64_t y_stride, void* stream);
int launch_lora_linear(int type, const void* x, int64_t x_stride, int64_t rows, const void* weight, const float* bias,
                       int64_t n, int64_t k, const float* a, const float* b, int64_t rank, float scale, float* side,
                       void* y, void* stream);
int launch_fuse_lora(int type, const void* weight, int64_t n, int64_t k, int64_t row_stride, int64_t column_stride,
                     const float* a, const float* b, int64_t rank, float scale, void* out, void* stream);
int launch_sample(int type, const void* logits, int64_t rows, int64_t vocab, int64_t logits_stride, float temperature,
                  int64_t top_k, double top_p, double min_p, uint64_t seed, const int64_t* streams,
                  const int64_t* positions, int64_t* tokens, float* log_probs, void* stream);
int launch_token_logprobs(int type, const void* hidden, int64_t hidden_stride, const void* weight, const float* bias,
                          const int64_t* targets, int64_t rows, int64_t size, int64_t vocab, float temperature,
                          float softcap, float* logprob, float* lse, float* entropy, float* scratch, void* stream);

}  // extern "C"
