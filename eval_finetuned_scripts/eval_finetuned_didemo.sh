#!/usr/bin/env bash
# Scores a fine-tuned checkpoint of InternVideo's tower (ViT-L/14) on DiDeMo. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" finetuned didemo \
  --mergeclip True \
  --batch_size_val 8 --max_words 77 --max_frames 32 --num_thread_reader 8 --interaction no \
  "$@"
