"""Better pictures without training: particles, proposals and noise that are chosen by their reward at sampling time."""
