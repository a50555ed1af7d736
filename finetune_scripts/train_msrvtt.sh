#!/usr/bin/env bash
# Fine-tunes InternVideo's tower (ViT-L/14) on MSR-VTT and scores the epoch it selects. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" train msrvtt \
  --epochs 5 --lr 1e-3 --coef_lr 4e-3 --batch_size 128 --batch_size_val 16 --freeze_layer_num 0 \
  --max_words 77 --max_frames 12 --num_thread_reader 4 \
  --expand_msrvtt_sentences \
  "$@"
