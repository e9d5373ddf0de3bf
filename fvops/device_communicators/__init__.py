"""How a group's collectives are carried out on one kind of device."""
