"""Binary networks: signs, their estimated gradients, and convolution by counting bits."""
