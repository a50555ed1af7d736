#!/usr/bin/env bash
# Fine-tunes a plain CLIP (ViT-B/16) on ActivityNet and scores the epoch it selects. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" ret activity \
  --epochs 5 --lr 1e-4 --coef_lr 1e-3 --batch_size 32 --batch_size_val 64 --freeze_layer_num 0 \
  --max_words 64 --max_frames 64 --num_thread_reader 8 --interaction no \
  "$@"
