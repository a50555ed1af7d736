#!/usr/bin/env bash
# Fine-tunes InternVideo's tower (ViT-L/14) on LSMDC and scores the epoch it selects. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" train lsmdc \
  --epochs 5 --lr 1e-3 --coef_lr 2e-3 --batch_size 64 --batch_size_val 16 --freeze_layer_num 0 \
  --max_words 77 --max_frames 8 --num_thread_reader 8 --mergeclip True \
  "$@"
