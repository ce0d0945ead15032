// attention() with the keys split too: for few rows over a long context, where rows x heads cannot fill the threads.
// Same arguments, same bits: threads compute chunks of kChunk keys, and the chunks are folded in order.
#pragma once

#include "attention.h"

namespace dschat {

// Key ranges that each (row, head) is cut into; `requested` <= 0 chooses (1 where rows and heads fill the threads).
int64_t attention_decode_splits(int threads, const AttentionArgs& args, int64_t requested);

// Floats of `partials`, the sums of every chunk before they are folded; 0 if splits is 1.
int64_t attention_decode_partials(const AttentionArgs& args, int64_t splits);

// splits as returned by attention_decode_splits; partials is shared by the team. SPMD; one barrier inside if
// splits > 1, none at the end.
void attention_decode(const Team& team, DType dtype, const AttentionArgs& args, int64_t splits, float* partials);

}  // namespace dschat
