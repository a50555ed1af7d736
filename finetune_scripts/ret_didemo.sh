#!/usr/bin/env bash
# Fine-tunes a plain CLIP (ViT-B/16) on DiDeMo and scores the epoch it selects. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" ret didemo \
  --epochs 5 --lr 1e-3 --coef_lr 1e-2 --batch_size 64 --batch_size_val 64 --freeze_layer_num 0 \
  --max_words 64 --max_frames 32 --num_thread_reader 8 \
  "$@"
