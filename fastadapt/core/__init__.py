"""What every operation shares: argument checks, backend choice, registration, kernel launches and dropout masks."""
