package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/govmm/govmm/migrate/hosttls"
	"github.com/spf13/cobra"
)

func newCerts() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "certs",
		Short: "Make certificates with which hosts trust each other (--tls-dir)",
		Long: `Make an authority (CA) and certificates that it signs, one for each host, for
--tls-dir of govmm receive and govmm migrate. Two hosts trust each other if the
same authority has signed the certificates of both.

  govmm certs init ca                  on a host that only you reach
  govmm certs issue ca alpha beta      makes ca/alpha and ca/beta
  scp -r ca/alpha root@alpha:/etc/govmm/tls
                                       and so on: a host gets its own directory
  govmm receive --listen :7000 --tls-dir /etc/govmm/tls            on beta
  govmm migrate --to beta:7000 --tls-dir /etc/govmm/tls            on alpha

This is enough for a few hosts. Who runs more has an authority already (step-ca,
Vault, cert-manager, a company's PKI), which renews certificates by itself: use
that one. It writes ca.pem, cert.pem and key.pem (PEM, the key without a
passphrase) to a directory; certificates need subjectAltName with the host's
names and extendedKeyUsage serverAuth and clientAuth. A receiver reads files that
change again.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "expected init or issue, found %.80q; see govmm certs --help", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef(cmd, "expected init or issue; see govmm certs --help")
		},
	}
	cmd.AddCommand(newCertsInit(), newCertsIssue())
	return cmd
}

// Days that certificates are valid for, unless the user says otherwise.
const (
	daysCA   = 3650
	daysHost = 365
	maxDays  = 36500
)

// validity is from an hour ago, since the clocks of hosts differ.
func validity(days int) (from, until time.Time) {
	now := time.Now()
	return now.Add(-time.Hour), now.Add(time.Duration(days) * 24 * time.Hour)
}

func newCertsInit() *cobra.Command {
	var days int
	cmd := &cobra.Command{
		Use:   "init DIR",
		Short: "Make an authority: ca.pem and ca-key.pem in DIR",
		Long: `Make an authority: ca.pem and ca-key.pem in DIR.

Who has ca-key.pem can make certificates for every host: keep it where no guest
runs. Nothing is overwritten.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 || args[0] == "" {
				return usagef(cmd, "expected one DIR; see %s --help", cmd.CommandPath())
			}
			return checkDays(cmd, days)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			from, until := validity(days)
			if err := hosttls.CreateCA(args[0], from, until); err != nil {
				return fmt.Errorf("certs init: %w", err)
			}
			_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "govmm: %s has an authority, valid until %s; govmm certs issue %s HOST makes certificates\n",
				args[0], until.UTC().Format(time.DateOnly), args[0])
			return nil
		},
	}
	cmd.Flags().IntVar(&days, "days", daysCA, "`N` days that the authority is valid")
	return cmd
}

func newCertsIssue() *cobra.Command {
	var days int
	cmd := &cobra.Command{
		Use:   "issue DIR HOST[,NAME...]...",
		Short: "Make a directory with key and certificate for each HOST",
		Long: `Make a directory DIR/HOST for each HOST, with ca.pem, cert.pem and key.pem: that
host's --tls-dir. DIR is that of govmm certs init.

HOST is a DNS name or an IP address, and so are further names of the same host
behind commas: migrate --to needs one of them. Nothing is overwritten: to renew a
certificate, move the old directory away, and copy the new files over those on the
host.`,
		Example: `  govmm certs issue ca alpha beta
  govmm certs issue ca alpha,alpha.example,10.0.0.1`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usagef(cmd, "expected DIR and at least one HOST; see %s --help", cmd.CommandPath())
			}
			for _, host := range args[1:] {
				if err := hosttls.CheckNames(strings.Split(host, ",")); err != nil {
					return usagef(cmd, "%v", err)
				}
			}
			return checkDays(cmd, days)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ca, err := hosttls.OpenCA(args[0])
			if err != nil {
				return fmt.Errorf("certs issue: %w", err)
			}
			from, until := validity(days)
			for _, host := range args[1:] {
				names := strings.Split(host, ",")
				dir := filepath.Join(args[0], names[0])
				if err := ca.Issue(dir, names, from, until); err != nil {
					return fmt.Errorf("certs issue: %w", err)
				}
				end := until
				if end.After(ca.Until()) {
					end = ca.Until()
				}
				_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "govmm: %s is the --tls-dir of %s, valid until %s\n",
					dir, strings.Join(names, ", "), end.UTC().Format(time.DateOnly))
			}
			return nil
		},
	}
	cmd.Flags().IntVar(&days, "days", daysHost, "`N` days that the certificates are valid, but not longer than the authority's own")
	return cmd
}

func checkDays(cmd *cobra.Command, days int) error {
	if days < 1 || days > maxDays {
		return usagef(cmd, "--days %d: must be between 1 and %d", days, maxDays)
	}
	return nil
}
