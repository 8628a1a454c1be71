import sys

from epiutils.report.run import main

sys.exit(main())
