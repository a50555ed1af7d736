#!/usr/bin/env bash
# Zero-shot on VATEX with InternVideo's tower (ViT-L/14), averaged with CLIP's weights. --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" zeroshot vatex \
  --mergeclip True --mergeweight 0.5 \
  --batch_size_val 128 --max_words 77 --max_frames 8 --num_thread_reader 8 --interaction no \
  "$@"
