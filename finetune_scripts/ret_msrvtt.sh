#!/usr/bin/env bash
# Fine-tunes a plain CLIP (ViT-B/32) on MSR-VTT and scores the epoch it selects. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" ret msrvtt \
  --epochs 5 --lr 1e-3 --coef_lr 5e-3 --batch_size 128 --batch_size_val 128 --freeze_layer_num 0 \
  --max_words 32 --max_frames 12 --num_thread_reader 8 --interaction no \
  --expand_msrvtt_sentences \
  "$@"
