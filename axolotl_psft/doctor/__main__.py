"""`python -m axolotl_psft.doctor config.yaml`."""

from axolotl_psft.doctor.command import doctor

if __name__ == "__main__":
    doctor(prog_name="python -m axolotl_psft.doctor")
