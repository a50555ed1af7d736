#!/usr/bin/env bash
# Scores a fine-tuned checkpoint of InternVideo's tower (ViT-L/14) on MSR-VTT. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" finetuned msrvtt \
  --mergeclip True \
  --batch_size_val 16 --max_words 77 --max_frames 12 --num_thread_reader 4 \
  "$@"
