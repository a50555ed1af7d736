#!/usr/bin/env bash
# Zero-shot on ActivityNet with InternVideo's tower (ViT-L/14), averaged with CLIP's weights. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" zeroshot activity \
  --mergeclip True \
  --batch_size_val 8 --max_words 77 --max_frames 16 --num_thread_reader 8 --interaction no \
  "$@"
