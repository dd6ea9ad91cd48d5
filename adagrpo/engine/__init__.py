"""How rollouts run: plans say which rows take which steps, one executor advances them."""
