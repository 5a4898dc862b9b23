package main

import "github.com/spf13/cobra"

func newCompletion() *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use:   "completion bash|zsh|fish|powershell",
		Short: "Print a script that completes govmm's commands in a shell",
		Long: `Print a script that completes govmm's commands, flags and the names of running
VMs in a shell.

  bash  govmm completion bash > /etc/bash_completion.d/govmm
  zsh   govmm completion zsh > "${fpath[1]}/_govmm"
  fish  govmm completion fish > ~/.config/fish/completions/govmm.fish`,
		ValidArgs: shells,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef(cmd, "expected one of bash, zsh, fish and powershell")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(out, true)
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			case "powershell":
				return root.GenPowerShellCompletionWithDesc(out)
			}
			return usagef(cmd, "shell %q: expected bash, zsh, fish or powershell", args[0])
		},
	}
}
