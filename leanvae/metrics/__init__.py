"""Measures of frames and clips: PSNR and similar ones, artefacts, Fréchet distances."""
