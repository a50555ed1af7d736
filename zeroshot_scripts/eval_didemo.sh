#!/usr/bin/env bash
# Zero-shot on DiDeMo with InternVideo's tower (ViT-L/14), averaged with CLIP's weights.
# InternVideo's own command lacks --mergeclip here, unlike its five others; --mergeclip=False gives that one.
# --help says more.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh" zeroshot didemo \
  --mergeclip True \
  --batch_size_val 32 --max_words 77 --max_frames 32 --num_thread_reader 8 --interaction no \
  "$@"
