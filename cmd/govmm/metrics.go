package main

import (
	"fmt"
	"net"

	"github.com/spf13/pflag"
)

// metricsFlags say where metrics are served beside the API socket.
type metricsFlags struct {
	metricsListen   string
	metricsInsecure bool
	metricsTCP      *net.TCPAddr // nil: nowhere
}

func (f *metricsFlags) registerMetrics(flags *pflag.FlagSet) {
	flags.StringVar(&f.metricsListen, "metrics-listen", "", "`HOST:PORT` at which GET /metrics is served too, by plain HTTP")
	flags.BoolVar(&f.metricsInsecure, "metrics-insecure", false, "let --metrics-listen be another address than a loopback one: whoever reaches it reads the metrics")
}

func (f *metricsFlags) checkMetrics() (err error) {
	if f.metricsListen == "" {
		return nil
	}
	if _, _, err := net.SplitHostPort(f.metricsListen); err != nil {
		return fmt.Errorf("--metrics-listen %.80q: expected HOST:PORT", f.metricsListen)
	}
	// Once: a name that is looked up again may have another address.
	if f.metricsTCP, err = net.ResolveTCPAddr("tcp", f.metricsListen); err != nil {
		return fmt.Errorf("--metrics-listen %.80s: %w", f.metricsListen, err)
	}
	if !f.metricsInsecure && !f.metricsTCP.IP.IsLoopback() {
		return fmt.Errorf("--metrics-listen %.80s: others than this host reach it, and anybody of them can read: give a loopback address, or --metrics-insecure", f.metricsListen)
	}
	return nil
}

// openMetrics makes the listener, before the sandbox; nil: there is none.
func (f *metricsFlags) openMetrics() (net.Listener, error) {
	if f.metricsTCP == nil {
		return nil, nil
	}
	return net.ListenTCP("tcp", f.metricsTCP)
}
