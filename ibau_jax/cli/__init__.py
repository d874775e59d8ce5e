"""What the scripts share: options, the job they describe, the run and its folder, the console."""
