"""What is measured of frames and clips: PSNR and its kin, artefacts, Frechet distances."""
