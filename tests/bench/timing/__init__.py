"""What ``speed.py`` times, how, and the floors that it holds times against."""
