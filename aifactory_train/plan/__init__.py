"""Where recipe and machine meet: layout, memory, time. Runs without torch."""
