"""What is said of models and conversions: to people, programs, plots and cards."""
