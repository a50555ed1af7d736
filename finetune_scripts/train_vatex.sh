#!/usr/bin/env bash
# Fine-tunes InternVideo's tower (ViT-L/14) on VATEX and scores the epoch it selects. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" train vatex \
  --epochs 5 --lr 1e-3 --coef_lr 5e-3 --batch_size 128 --batch_size_val 16 --freeze_layer_num 0 \
  --max_words 77 --max_frames 8 --num_thread_reader 8 \
  "$@"
